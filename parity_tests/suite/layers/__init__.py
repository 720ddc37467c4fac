"""The contract that every kind of layer keeps, and what is special to one kind."""
