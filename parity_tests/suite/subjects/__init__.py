"""What is compared: public functions, layers and networks in torch, in Flax and in the oracle."""
