"""Run a peer's code, unchanged, from a checkout that the user gives: the R-CONV authors', R-GAP's, DLG's, breaching.

Nothing of theirs is in this repository. Called as a process of its own, so that its global settings (default dtype,
seeds, modules) stay there: ``python run_peer.py PEER CHECKOUT PHOTO.pt RESULT.pt [NETWORK ACTIVATION]``. torchvision is
replaced by a stand-in whose data sets hold the photo given, since this must run without it and without downloads; the
rest is theirs. The seconds are those of their attack, from the gradients to the picture (R-GAP and DLG: of the whole
script, whose other parts take no time to speak of), in this process' own time, whatever else the machine does: on one
thread that is what an idle machine's clock would show.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

LABEL = 7
NOTEBOOKS = {
    "lenet_all_relu": "Various_Settings/R_LetNet_All_Relu.ipynb",
    "cnn6_o": "Various_Settings/O_CNN6.ipynb",
}
_ACTIVATIONS = {"relu": "ReLU", "leaky_relu": "LeakyReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def main(peer: str, checkout: str, photo_path: str, result_path: str, *more: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    time.time = time.process_time  # what they measure themselves with
    photo = torch.load(photo_path, weights_only=True)
    photo = photo if peer == "rrconv" else photo.float()  # as torchvision's ToTensor makes it
    shown = _install_stand_in_for_torchvision(photo)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "code"
        shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git"))  # they write where they stand
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        found = PEERS[peer](folder, shown, *more)
        os.chdir("/")
    torch.save(found, result_path)


def rrconv(folder: Path, _: list[Any], network: str, activation: str) -> dict[str, Any]:
    """``main.py`` for LeNet-O, a notebook for another network."""
    if network in NOTEBOOKS:
        names, seconds = _run_notebook(folder / NOTEBOOKS[network])
    else:
        sys.argv = ["main.py", "-d", "CIFAR100", "-i", "0", "-a", _ACTIVATIONS[activation]]
        names = runpy.run_path("main.py", run_name="__main__")
        seconds = names["end_time"] - names["start_time"]
    return {
        "seconds": seconds,
        "recovered": names["reconstructed_val"].detach().double(),
        "original": names["oringinal_val"].detach().double(),
        "label": names["gt_label"],
        "parameters": [p.detach().clone() for p in names["net"].parameters()],
    }


def rgap(_: Path, shown: list[Any]) -> dict[str, Any]:
    """CNN6 on one image; its answer is the first tensor that it turns into a picture."""
    sys.argv = ["main.py", "-i", "0", "-m", "CNN6"]
    start = time.process_time()
    runpy.run_path("main.py", run_name="__main__")
    return {"seconds": time.process_time() - start, "recovered": shown[0].double()}


def dlg(_: Path, __: list[Any]) -> dict[str, Any]:
    """Sigmoid LeNet, 300 steps of L-BFGS from one start."""
    sys.argv = ["main.py", "--index", "0"]
    start = time.process_time()
    names = runpy.run_path("main.py", run_name="__main__")
    return {"seconds": time.process_time() - start, "recovered": names["dummy_data"].detach()[0].double()}


def breaching(folder: Path, _: list[Any], network: str, activation: str) -> dict[str, Any]:
    """Inverting Gradients by breaching's class and settings, but 4800 steps as for CIFAR, on a network of this package.

    Of their package only the attacks are loaded: the rest wants torchvision and hydra. The label is told.
    """
    import torch
    from omegaconf import OmegaConf

    from rconv_fast import models

    for name in ("breaching", "breaching.cases", "breaching.cases.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        sys.modules[name] = package
    from breaching.attacks import prepare_attack

    settings = folder / "breaching" / "config" / "attack"
    config = OmegaConf.merge(
        *(OmegaConf.load(settings / f"{name}.yaml") for name in ("_default_optimization_attack", "invertinggradients")),
        {"optim": {"max_iterations": 4800}},
    )
    model: Any = models.MODELS[network](activation, dtype=torch.float32)
    photo, _ = sys.modules["torchvision"].datasets.CIFAR100()[0]
    loss, x, label = torch.nn.CrossEntropyLoss(), photo[None], torch.tensor([LABEL])
    gradients = torch.autograd.grad(loss(model(x), label), list(model.parameters()))
    picture = types.SimpleNamespace(shape=x.shape[1:], modality="vision")
    sent = {"parameters": list(model.parameters()), "buffers": [], "metadata": picture}
    facts = {"labels": label, "num_data_points": 1, "local_hyperparams": None}
    shared = {"gradients": gradients, "buffers": [], "metadata": facts}
    attacker = prepare_attack(model, loss, config, {"dtype": torch.float32, "device": torch.device("cpu")})
    start = time.process_time()
    found, _ = attacker.reconstruct([sent], [shared], {}, dryrun=False)
    return {"seconds": time.process_time() - start, "recovered": found["data"].detach()[0].double()}


PEERS: dict[str, Callable[..., dict[str, Any]]] = {
    "rrconv": rrconv,
    "rgap": rgap,
    "dlg": dlg,
    "breaching": breaching,
}


def _run_notebook(path: Path) -> tuple[dict[str, Any], float]:
    """Run the code cells in order; the clock covers those from the first call of theirs to the picture."""
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    seconds, running = 0.0, False
    for cell in cells:
        source = "".join(cell["source"])
        running = (running or "=inspect_model(net)" in source) and "reconstructed_val" not in source
        start = time.process_time()
        exec(compile(source, str(path), "exec"), names)
        if running:
            seconds += time.process_time() - start
    return names, seconds


def _install_stand_in_for_torchvision(photo: Any) -> list[Any]:
    """Put a minimal ``torchvision`` in place; returned is the list that tensors turned into pictures end up in.

    Its data sets hold one photo, which is a tensor already; plots of it are left out, as it is no picture.
    """
    from matplotlib import pyplot

    shown: list[Any] = []

    class OnePhoto:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __getitem__(self, _: int) -> tuple[Any, int]:
            return photo, LABEL

        def __len__(self) -> int:
            return 1

    class Unchanged:
        def __init__(self, *_: object) -> None: ...

        def __call__(self, image: Any) -> Any:
            return image

    class ToPILImage:
        def __call__(self, image: Any) -> Any:
            shown.append(image)
            return image.detach().permute(1, 2, 0).clamp(0, 1).numpy()

    torchvision: Any = types.ModuleType("torchvision")
    torchvision.__version__ = "none"
    for name in ("models", "datasets", "transforms"):
        module = types.ModuleType(f"torchvision.{name}")
        setattr(torchvision, name, module)
        sys.modules[f"torchvision.{name}"] = module
    for name in ("CIFAR10", "CIFAR100", "MNIST"):
        setattr(torchvision.datasets, name, OnePhoto)
    for name in ("Compose", "Resize", "CenterCrop", "ToTensor"):
        setattr(torchvision.transforms, name, Unchanged)
    torchvision.transforms.ToPILImage = ToPILImage
    sys.modules["torchvision"] = torchvision
    pyplot.imshow = lambda *_, **__: None  # type: ignore[assignment]
    return shown


if __name__ == "__main__":
    main(*sys.argv[1:])
