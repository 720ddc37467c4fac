"""The command line: `python -m probly_torch.training fit --config config.yaml`, and test, predict and validate alike.

LightningCLI with any LightningModule and LightningDataModule. The network is built in the configuration, too, by the
path of a class or of a function that says what it returns:

    model:
      class_path: EnsembleClassifier
      init_args:
        model:
          class_path: probly_torch.batchensemble
          init_args:
            base: {class_path: mypackage.networks.MLP, init_args: {sizes: [2, 128, 128, 2]}}
            num_members: 4
        loss: probly_torch.losses.member_cross_entropy
        weight_decay: 1.0e-4
        optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
        lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 50}}
    data: mypackage.data.Moons

A checkpoint holds this configuration: `EnsembleClassifier.load_from_checkpoint(path)` builds it again.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from probly_torch.training import EnsembleClassifier, EnsembleRegressor  # noqa: F401 (known by their names, then)


def main(arguments: Sequence[str] | None = None) -> None:
    # The modules make their own optimizers, from the optimizer and lr_scheduler that they are given.
    LightningCLI(auto_configure_optimizers=False, args=arguments if arguments is None else list(arguments))


if __name__ == "__main__":
    main()
