"""Run the R-CONV authors' code, unchanged, from a checkout the user gives.

Nothing of theirs is in this repository. Called as a process of its own, so that its global settings (default
dtype, seeds, modules) stay there: ``python peer_rrconv.py CHECKOUT NETWORK ACTIVATION PHOTO.pt RESULT.pt``.
Their data set class is replaced by one that holds the photo given, since this must run without torchvision
and without downloads; the rest is theirs. The time is that of their attack: from the gradients to the
reconstructed photo.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

LABEL = 7
NOTEBOOKS = {"lenet_all_relu": "Various_Settings/R_LetNet_All_Relu.ipynb"}
_ACTIVATIONS = {"relu": "ReLU", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def main(checkout: str, network: str, activation: str, photo_path: str, result_path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    photo = torch.load(photo_path, weights_only=True)
    _install_stand_in_for_torchvision(photo)
    folder = Path(checkout).resolve()
    sys.path.insert(0, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # they write reconstruction.png where they stand
        if network in NOTEBOOKS:
            names, seconds = _run_notebook(folder / NOTEBOOKS[network])
        else:
            sys.argv = ["main.py", "-d", "CIFAR100", "-i", "0", "-a", _ACTIVATIONS[activation]]
            names = runpy.run_path(str(folder / "main.py"), run_name="__main__")
            seconds = names["end_time"] - names["start_time"]
        os.chdir("/")
    torch.save(
        {
            "seconds": seconds,
            "recovered": names["reconstructed_val"].detach().double(),
            "original": names["oringinal_val"].detach().double(),
            "label": names["gt_label"],
            "parameters": [p.detach().clone() for p in names["net"].parameters()],
        },
        result_path,
    )


def _run_notebook(path: Path) -> tuple[dict[str, Any], float]:
    """Run the code cells in order; the clock covers those from the first call of theirs to the picture."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    seconds, running = 0.0, False
    for cell in cells:
        source = "".join(cell["source"])
        running = (running or "=inspect_model(net)" in source) and "reconstructed_val" not in source
        start = time.perf_counter()
        exec(compile(source, str(path), "exec"), names)
        if running:
            seconds += time.perf_counter() - start
    return names, seconds


def _install_stand_in_for_torchvision(photo: Any) -> None:
    """Put a minimal ``torchvision`` in place whose data sets hold one photo, already a tensor of 32x32."""

    class OnePhoto:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __getitem__(self, _: int) -> tuple[Any, int]:
            return photo, LABEL

    class Unchanged:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, image: Any) -> Any:
            return image

    class ToPILImage:
        def __call__(self, image: Any) -> Any:
            return image.permute(1, 2, 0).clamp(0, 1).numpy()

    torchvision = types.ModuleType("torchvision")
    for name in ("models", "datasets", "transforms"):
        module = types.ModuleType(f"torchvision.{name}")
        setattr(torchvision, name, module)
        sys.modules[f"torchvision.{name}"] = module
    for name in ("CIFAR10", "CIFAR100", "MNIST"):
        setattr(sys.modules["torchvision.datasets"], name, OnePhoto)
    for name in ("Compose", "Resize", "CenterCrop", "ToTensor"):
        setattr(sys.modules["torchvision.transforms"], name, Unchanged)
    sys.modules["torchvision.transforms"].ToPILImage = ToPILImage  # type: ignore[attr-defined]
    sys.modules["torchvision"] = torchvision


if __name__ == "__main__":
    main(*sys.argv[1:])
