"""DP-SGD as Opacus does it: what one step gives away with its noise and without, and what privacy it promises.

Needs opacus (``pip install "rconv-fast[opacus]"``).
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rconv_fast
from rconv_fast import models
from rconv_fast.audit.privacy import DpSgd, privacy_table

try:
    from opacus import PrivacyEngine

    from rconv_fast.integrations.opacus import StepRecorder
except ImportError as error:
    print(f"SKIPPED: {error}")
    sys.exit()


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # Opacus recommends its secure random numbers
    model = models.cnn3("leaky_relu", n_classes=10, in_channels=1, image_size=16, dtype=torch.float32)
    before = copy.deepcopy(model)
    grid = torch.linspace(-1, 1, 16)
    x = torch.exp(-3 * (grid[:, None].square() + (grid[None, :] - 0.2).square()))[None, None]
    y = torch.tensor([3])

    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=100.0,
        poisson_sampling=False,
    )
    recorder = StepRecorder(optimizer, private)
    nn.functional.cross_entropy(private(x), y).backward()
    optimizer.step()

    assert recorder.clean is not None
    assert recorder.shared is not None
    found = rconv_fast.invert(before, recorder.clean, (1, 16, 16), time_limit=60)
    assert found.inputs is not None
    print(f"without noise: {found.verdict}, PSNR {rconv_fast.psnr(found.inputs, x.double()):.0f} dB")
    noisy = rconv_fast.invert(before, recorder.shared, (1, 16, 16), batch_size=1, labels=[3], time_limit=60)
    print(f"with noise: {noisy.verdict}")
    for row in privacy_table(before, (1, 16, 16), [0.5, 1.0, 2.0], DpSgd(clip=100.0), probe=(x, y)):
        print(
            f"noise multiplier {row.noise_multiplier}: epsilon {row.epsilon:.1f}, reconstruction at most "
            f"{row.reconstruction:.1%} (1 % by guessing), no estimate better than {row.predicted_psnr:.1f} dB"
        )


if __name__ == "__main__":
    main()
