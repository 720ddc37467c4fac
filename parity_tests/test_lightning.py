"""Ensembles inside a person's own LightningModule: precision plugins, prediction, checkpoints."""

import logging

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probly_torch as pt


class Classifier(lightning.LightningModule):
    """A plain module around any model that follows the contract."""

    def __init__(self, make):
        super().__init__()
        layers = [nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2)]
        self.model = make(nn.Sequential(*layers), 3)
        self.losses = []

    def training_step(self, batch, index):
        x, y = batch
        loss = pt.losses.member_cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch, index):
        return pt.uncertainty.mean_probs(self.model(batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec.*", "ignore:.*isinstance.*")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [pt.ensemble, pt.batchensemble])
def test_fit_predict_and_load(make, precision, tmp_path):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    x = torch.randn(256, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(make)
    trainer.fit(module, data)
    assert sum(module.losses[-8:]) < 0.8 * sum(module.losses[:8])
    probs = torch.cat(trainer.predict(module, data))
    assert ((probs.argmax(-1) == (x[:, 0] > 0)).float().mean() > 0.85).item()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Classifier(make).to(dtype)
    loaded.load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), module.state_dict().values(), strict=True)
    )
