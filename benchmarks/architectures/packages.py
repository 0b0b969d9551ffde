"""UNets of two packages from PyPI, narrow: ``azula`` and ``monai``."""

from __future__ import annotations

import torch

from .example import Example, Factory, normal

__all__ = ["PACKAGES"]


def _azula() -> Example:
    from azula.nn.unet import UNet
    from torch import Tensor, nn

    class TimeUNet(nn.Module):
        """The package's UNet takes a modulation vector; the time path in front of it is the user's."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
            self.net = UNet(3, 3, hid_channels=(16, 32), hid_blocks=(1, 1), norm="group", groups=8, mod_features=32)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            frequencies = torch.exp(-9.2 * torch.arange(8) / 8)
            angles = t[:, None].float() * frequencies
            result: Tensor = self.net(x, mod=self.embed(torch.cat([angles.sin(), angles.cos()], dim=1)))
            return result

    return Example(TimeUNet().eval(), {"x": normal(2, 3, 16, 16), "t": torch.tensor([100, 700])}, timestep="t")


def _monai() -> Example:
    from monai.networks.nets import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        channels=(16, 32),
        attention_levels=(False, True),
        norm_num_groups=8,
        num_head_channels=8,
    )
    return Example(
        model.eval(), {"x": normal(2, 1, 16, 16), "timesteps": torch.tensor([100, 700])}, timestep="timesteps"
    )


PACKAGES: dict[str, Factory] = {"azula UNet": _azula, "MONAI DiffusionModelUNet": _monai}
