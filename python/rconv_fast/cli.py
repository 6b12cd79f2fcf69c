"""The command line: ``rconv-fast demo``, ``invert``, ``info``.

Exit codes: 0 recovered and verified, 1 ran but not verified, 2 bad usage or input, 70 a bug (with its
traceback), 130 interrupted.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from rconv_fast import errors

if TYPE_CHECKING:
    from PIL.Image import Image

VERIFIED, NOT_VERIFIED, BAD_INPUT, BUG, INTERRUPTED = 0, 1, 2, 70, 130

app = typer.Typer(
    name="rconv-fast",
    help="Exact gradient inversion, to audit your own federated-learning set-ups.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"

    def resolve(self) -> torch.device:
        """Return the device, the GPU where there is one for `auto`."""
        available = torch.cuda.is_available()
        if self is Device.auto:
            return torch.device("cuda" if available else "cpu")
        require_cuda = self is not Device.cuda or available
        errors.require(require_cuda, "rconv-fast", "--device", "be available", f"{self.value} (torch sees no GPU)")
        return torch.device(self.value)


class Precision(str, Enum):
    """Precision of the model and of its gradients; the solves are done in float64 either way."""

    float64 = "float64"
    float32 = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of that name."""
        return torch.float64 if self is Precision.float64 else torch.float32


class Loss(str, Enum):
    """The loss that the gradients were taken of, mean over the batch."""

    cross_entropy = "cross_entropy"
    binary_cross_entropy_with_logits = "binary_cross_entropy_with_logits"
    mse = "mse"


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Your own photo instead of the one shipped.")] = None,
    size: Annotated[int, typer.Option(help="Side of the square photo in pixels: 32 or 224.")] = 32,
    batch: Annotated[int, typer.Option(help="How many photos share one gradient.")] = 1,
    activation: Annotated[str, typer.Option(help="Activation of the network: relu, leaky_relu, sigmoid, ...")] = "relu",
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")] = Device.auto,
    dtype: Annotated[Precision, typer.Option(help="Precision of the model and its gradients.")] = Precision.float64,
    seed: Annotated[int, typer.Option(help="Of the network's parameters and of the labels.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for comparison.png and report.json.")] = Path("out/demo"),
) -> None:
    """Compute the gradients of real photos with a CNN, forget the photos, recover them from the gradients."""
    with _one_line_errors():
        raise typer.Exit(_demo(image, size, batch, activation, device.resolve(), dtype.dtype, seed, out))


@app.command()
def invert(
    model: Annotated[str, typer.Option(help="PKG.MODULE:FACTORY, imported and called: this runs your own code.")],
    state: Annotated[Path, typer.Option(help="The model's parameters: safetensors, or a torch.save file.")],
    gradients: Annotated[Path, typer.Option(help="The gradients, by parameter name or in parameter order.")],
    input_shape: Annotated[str, typer.Option(help="Shape of one sample, as in 3x32x32.")],
    batch: Annotated[int | None, typer.Option(help="Samples behind the gradients; found if not given.")] = None,
    loss: Annotated[Loss, typer.Option(help="The loss, mean over the batch.")] = Loss.cross_entropy,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")] = Device.auto,
    out: Annotated[Path, typer.Option(help="Folder for recovered.png, inputs.safetensors, report.json.")] = Path(
        "out/invert"
    ),
) -> None:
    """Recover the batch behind gradients of your own model, taken in evaluation mode."""
    with _one_line_errors():
        raise typer.Exit(_invert(model, state, gradients, input_shape, batch, loss.value, device.resolve(), out))


@app.command()
def info() -> None:
    """Say what this binary was built with and what it finds here."""
    from rconv_fast._build_info import build_info

    with _one_line_errors():
        table = Table(show_header=False, box=None, pad_edge=False)
        for key, value in build_info().items():
            table.add_row(str(key), escape(_as_text(value)))
        Console(soft_wrap=True).print(table)


def main() -> None:
    """Run the command line, as the script ``rconv-fast`` does."""
    # Without this a model of the user's own folder cannot be named: an installed script doesn't look there.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        app()
    except Exception:  # Python's own exit code 1 would read as "not verified"
        traceback.print_exc()
        sys.exit(BUG)


def _demo(
    image: Path | None,
    size: int,
    batch: int,
    activation: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    out: Path,
) -> int:
    from rconv_fast import models
    from rconv_fast.metrics import match_samples, mse, psnr
    from rconv_fast.report import files, pictures

    errors.require(size in (32, 224), "demo", "--size", "be 32 or 224", size)
    errors.require(batch >= 1, "demo", "--batch", "be >= 1", batch)
    factory = models.cnn3 if size == 32 else models.cnn4_224
    model = factory(activation, dtype=dtype, seed=seed).to(device)
    photos = _photos(image, size, batch).to(device, dtype)
    _make_folder(out)

    gradients = _client_gradients(model, photos, seed)
    inversion, seconds = _timed_inversion(out, model, gradients, tuple(photos.shape[1:]))

    recovered = inversion.inputs
    if recovered.shape != photos.shape:
        _console().print(f"not recovered: {len(recovered)} samples found, {batch} were there")
        return NOT_VERIFIED
    photos = photos[match_samples(recovered, photos)].to(recovered.dtype)
    pictures.save_comparison(out / "comparison.png", photos, recovered)
    report = {
        "psnr": psnr(recovered, photos),
        "mse": mse(recovered, photos),
        "psnr_per_sample": [psnr(r, p) for r, p in zip(recovered, photos, strict=True)],
        **_report(inversion, seconds),
        "settings": {
            "model": factory.__name__,
            "activation": activation,
            "size": size,
            "batch": batch,
            "image": None if image is None else image.name,
            "dtype": dtype,
            "device": device,
            "seed": seed,
        },
    }
    files.save_report(out / "report.json", report)
    _print_result(inversion, seconds, f"PSNR {min(report['psnr_per_sample']):.0f} dB", out, "comparison.png")
    return VERIFIED if inversion.verified else NOT_VERIFIED


def _invert(
    model: str,
    state: Path,
    gradients: Path,
    input_shape: str,
    batch: int | None,
    loss: str,
    device: torch.device,
    out: Path,
) -> int:
    from rconv_fast.report import files, pictures

    pattern = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", input_shape)
    errors.require(pattern is not None, "invert", "--input-shape", "look like 3x32x32", repr(input_shape))
    shape = tuple(int(n) for n in input_shape.split("x"))
    errors.require(batch is None or batch >= 1, "invert", "--batch", "be >= 1", batch)
    parameters = files.load_tensors(state, "--state")
    shared = files.load_tensors(gradients, "--gradients")
    network = _load_state(_build_model(model), parameters).to(device)
    shared = (
        {n: g.to(device) for n, g in shared.items()} if isinstance(shared, dict) else [g.to(device) for g in shared]
    )
    _make_folder(out)

    inversion, seconds = _timed_inversion(out, network, shared, shape, batch_size=batch, loss=loss)

    pictures.save_batch(out / "recovered.png", inversion.inputs)
    files.save_inputs(out / "inputs.safetensors", inversion.inputs, inversion.labels)
    settings = {"model": model, "input_shape": input_shape, "batch": batch, "loss": loss, "device": device}
    files.save_report(out / "report.json", {**_report(inversion, seconds), "settings": settings})
    n = len(inversion.inputs)
    _print_result(inversion, seconds, f"{n} sample{'s' if n > 1 else ''} recovered", out, "recovered.png")
    return VERIFIED if inversion.verified else NOT_VERIFIED


def _timed_inversion(
    out: Path, model: nn.Module, gradients: Any, shape: tuple[int, ...], **options: Any
) -> tuple[Any, float]:
    """Run ``invert`` behind a progress display; all it is given are the model, the gradients and a shape."""
    import rconv_fast
    from rconv_fast.progress import ProgressDisplay
    from rconv_fast.report import files

    start = time.perf_counter()
    try:
        with ProgressDisplay() as show:
            inversion = rconv_fast.invert(model, gradients, shape, progress=show, **options)
    except errors.InterruptedInversionError as interrupted:
        files.save_partial(out / "partial.safetensors", interrupted.inversion.features, interrupted.inversion.inputs)
        _stop(f"{interrupted}; saved in {out / 'partial.safetensors'}", INTERRUPTED)
    return inversion, time.perf_counter() - start


def _client_gradients(model: nn.Module, photos: Tensor, seed: int) -> dict[str, Tensor]:
    """Do what a client does: one backward pass over its private batch. Only the gradients leave."""
    generator = torch.Generator().manual_seed(seed)
    n_classes = next(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    labels = torch.randint(n_classes, (len(photos),), generator=generator).to(photos.device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(photos), labels)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


_PHOTOS: dict[str, tuple[int, int, int]] = {
    "astronaut": (10, 120, 220),
    "chelsea": (20, 100, 240),
    "coffee": (0, 150, 400),
    "rocket": (20, 160, 400),
    "stereo_motorcycle": (60, 130, 400),
    "retina": (200, 200, 1000),
    "hubble_deep_field": (300, 400, 300),
    "immunohistochemistry": (100, 100, 300),
}
"""Real photos in scikit-image's wheel, and the square of each that is shown: top, left, side."""


def _photos(path: Path | None, size: int, batch: int) -> Tensor:
    """Load square photos, antialiased to `size` pixels: shape (B, 3, size, size), float64 in [0, 1]."""
    most = len(_PHOTOS)
    errors.require(batch <= most, "demo", "--batch", f"be <= {most}, the number of photos shipped", batch)
    crops = [] if path is None else [_own_photo(path)]
    crops += [_shipped_photo(name) for name in list(_PHOTOS)[: batch - len(crops)]]
    return torch.stack([_to_tensor(crop, size) for crop in crops])


def _own_photo(path: Path) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    errors.require(path.is_file(), "demo", "--image", "be a file", path)
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise errors.ArgumentError(f"demo: --image must be a picture that Pillow reads, got {path}") from error
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _shipped_photo(name: str) -> Image:
    try:
        import skimage.data
        from PIL import Image
    except ImportError as error:
        raise errors.MissingDependencyError("demo: pip install scikit-image, whose photos it uses") from error
    top, left, side = _PHOTOS[name]
    loaded = getattr(skimage.data, name)()
    pixels = loaded[0] if isinstance(loaded, tuple) else loaded
    return Image.fromarray(pixels[top : top + side, left : left + side])


def _to_tensor(picture: Image, size: int) -> Tensor:
    import numpy as np
    from PIL import Image

    small = picture.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).double() / 255


def _build_model(spec: str) -> nn.Module:
    """Import ``PKG.MODULE:FACTORY`` and call it: this runs code, the user's own."""
    module_name, _, factory_name = spec.partition(":")
    errors.require(bool(module_name and factory_name), "invert", "--model", "look like PKG.MODULE:FACTORY", repr(spec))
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), factory_name)
        model = factory()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise errors.ArgumentError(f"invert: --model must be importable and callable, got {spec}: {reason}") from error
    kind = type(model).__name__
    errors.require_type(isinstance(model, nn.Module), "invert", "--model", "return a torch.nn.Module", kind)
    assert isinstance(model, nn.Module)
    return model


def _load_state(model: nn.Module, state: dict[str, Tensor] | list[Tensor]) -> nn.Module:
    """Fill the model, in the precision of the file, and switch it to evaluation mode."""
    if isinstance(state, list):
        names = list(model.state_dict())
        errors.require(len(state) == len(names), "invert", "--state", f"hold {len(names)} tensors", len(state))
        state = dict(zip(names, state, strict=True))
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model = model.to(dtypes.pop())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
        raise errors.ArgumentError(f"invert: --state must fit the model, got {reason}") from error
    return model.eval()


def _report(inversion: Any, seconds: float) -> dict[str, Any]:
    from rconv_fast.report.files import layer_rows

    return {
        "gradient_residual": float(inversion.gradient_residual),
        "verified": bool(inversion.verified),
        "determined": float(inversion.determined.double().mean()),
        "seconds": seconds,
        "labels": inversion.labels,
        "layers": layer_rows(inversion.layers),
        "torch": torch.__version__,
    }


def _print_result(inversion: Any, seconds: float, headline: str, out: Path, picture: str) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("layer", "kind", "rows", "unknowns", "residual", "solver", "seconds"):
        table.add_column(column, justify="left" if column in ("layer", "kind", "solver") else "right")
    for layer in inversion.layers:
        residual = "-" if layer.residual is None else f"{layer.residual:.0e}"
        cells = (
            layer.name,
            layer.kind,
            layer.rows,
            layer.unknowns,
            residual,
            layer.solver,
            f"{layer.seconds:.2f}",
        )
        table.add_row(*(escape("-" if cell is None else str(cell)) for cell in cells))
    console = _console()
    console.print(table)
    console.print()
    verdict = "[green]verified[/green]" if inversion.verified else "[yellow]not verified[/yellow]"
    console.print(f"[bold]{headline}[/bold] in {seconds:.2f} s, {verdict}: ", end="")
    console.print(f"the gradients of the result match to {float(inversion.gradient_residual):.0e}")
    for name in (picture, "report.json"):
        console.print(f"  {escape(str(out / name))}", highlight=False)


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_as_text(v)}" for k, v in value.items()) or "none"
    return "none" if value is None else str(value) or "none"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.ArgumentError(f"rconv-fast: --out must be a folder that can be made, got {path}") from error


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn the package's errors into one line and exit code 2, Ctrl-C into 130; bugs keep their traceback."""
    try:
        yield
    except (errors.RconvError, OSError) as error:
        _stop(f"error: {error}", BAD_INPUT)
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
