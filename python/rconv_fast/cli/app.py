"""The commands and their options, as typer has them: what a command does is in a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rconv_fast import __version__
from rconv_fast.cli import screen
from rconv_fast.cli.options import Device, Precision

app = typer.Typer(
    name="rconv-fast",
    help="What gradients give away, exactly: to audit your own federated-learning set-ups.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Option(
        help="PKG.MODULE:FACTORY or file.py:FACTORY (this runs your own code), or a name in rconv_fast.models."
    ),
]
Shape = Annotated[str, typer.Option(help="Shape of one sample, as in 3x32x32.")]
Batches = Annotated[str, typer.Option(help="Batch sizes, as in 1,4,8.")]
Where = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")]
Out = Annotated[Path, typer.Option(help="Folder for report.json, report.html and the pictures.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run's files from --out.")]
JsonFile = Annotated[Path | None, typer.Option(help="Write the report there as JSON.")]
HtmlFile = Annotated[Path | None, typer.Option(help="Write the report there as a page.")]
Training = Annotated[bool, typer.Option("--training", help="Clients' models are in training mode.")]
FailOn = Annotated[
    str | None, typer.Option(help="Exit code 1 at this verdict or a worse one: exact, partial, 'features only', ...")
]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """What gradients give away, exactly: to audit your own federated-learning set-ups."""
    if version:
        print(f"rconv-fast {__version__}")


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="Your own photo instead of the one shipped.")] = None,
    size: Annotated[int, typer.Option(help="Side of the square photo in pixels: 32 or 224.")] = 32,
    batch: Annotated[int, typer.Option(help="How many photos share one gradient.")] = 1,
    model: Annotated[str | None, typer.Option(help="A network of rconv_fast.models; by the size if not given.")] = None,
    activation: Annotated[str, typer.Option(help="Activation of the network: relu, leaky_relu, sigmoid, ...")] = "relu",
    noise: Annotated[float, typer.Option(help="Noise on the gradients, relative to each tensor's size.")] = 0.0,
    device: Where = Device.auto,
    dtype: Annotated[Precision, typer.Option(help="Precision of the model and its gradients.")] = Precision.float64,
    seed: Annotated[int, typer.Option(help="Of the network's parameters and of the labels.")] = 0,
    out: Out = Path("out/demo"),
    overwrite: Overwrite = False,
) -> int:
    """Compute the gradients of real photos with a CNN, forget the photos, recover them from the gradients."""
    from rconv_fast.cli.demo import demo

    return demo(image, size, batch, model, activation, noise, device, dtype, seed, out, overwrite)


@app.command()
def check(
    model: Model,
    input_shape: Shape,
    batch: Batches = "1",
    training: Training = False,
    json: JsonFile = None,
    html: HtmlFile = None,
    fail_on: FailOn = None,
) -> int:
    """Count every layer's equations from the model's structure alone: seconds, no gradients."""
    from rconv_fast.cli.judging import check

    return check(model, input_shape, batch, training, json, html, fail_on)


@app.command()
def audit(
    model: Model,
    input_shape: Shape,
    batch: Batches = "1",
    state: Annotated[Path | None, typer.Option(help="A checkpoint: trained models differ from new ones.")] = None,
    loss: Annotated[str, typer.Option(help="The loss that clients use.")] = "cross_entropy",
    training: Training = False,
    noise: Annotated[float, typer.Option(help="Noise on the gradients, relative to each tensor's size.")] = 0.0,
    defences: Annotated[bool, typer.Option("--defences", help="Also attack behind the usual defences.")] = False,
    seed: Annotated[int, typer.Option(help="Of the probe.")] = 0,
    json: JsonFile = None,
    html: HtmlFile = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report there for a model card.")] = None,
    fail_on: FailOn = None,
) -> int:
    """Judge a model with a probe: what would leak at these batch sizes, where, and what would stop it."""
    from rconv_fast.cli.judging import audit

    given = {"loss": loss, "noise": noise, "defences": defences, "seed": seed}
    written = {"json": json, "html": html, "markdown": markdown}
    return audit(model, state, input_shape, batch, training, given, written, fail_on)


@app.command()
def invert(
    model: Model,
    state: Annotated[Path, typer.Option(help="The model's state: safetensors, npz, or a torch.save file.")],
    input_shape: Shape,
    gradients: Annotated[Path | None, typer.Option(help="Gradients, by parameter name or in parameter order.")] = None,
    after: Annotated[Path | None, typer.Option(help="Instead of them: the state after the client's training.")] = None,
    lr: Annotated[float | None, typer.Option(help="With --after: the client's learning rate.")] = None,
    steps: Annotated[int, typer.Option(help="With --after: the client's local steps.")] = 1,
    momentum: Annotated[float, typer.Option(help="With --after: of the client's SGD.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="With --after: of the client's SGD.")] = 0.0,
    optimizer: Annotated[
        str, typer.Option(help="With --after: sgd, or adam or adamw, whose first step it was.")
    ] = "sgd",
    eps: Annotated[float, typer.Option(help="With --after: of the client's Adam.")] = 1e-8,
    batch: Annotated[int | None, typer.Option(help="Samples behind the gradients; found if not given.")] = None,
    loss: Annotated[str, typer.Option(help="The loss, as torch.nn.functional names it.")] = "cross_entropy",
    reduction: Annotated[str | None, typer.Option(help="Of the loss over the batch: mean or sum.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Of the loss.")] = None,
    scale: Annotated[str | None, typer.Option(help="Factor on the gradients; 'unknown' finds it (clipping).")] = None,
    noise: Annotated[float | None, typer.Option(help="Noise on the gradients, relative to each tensor's size.")] = None,
    quantum: Annotated[str | None, typer.Option(help="Step of the grid the inputs lie on, as in 1/255.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; what is known by then is reported.")] = None,
    training: Training = False,
    device: Where = Device.auto,
    out: Out = Path("out/invert"),
    overwrite: Overwrite = False,
) -> int:
    """Recover the batch behind gradients, or behind an update, of your own model."""
    from rconv_fast.cli.inverting import Update, invert

    update = None if after is None else Update(after, lr, steps, momentum, weight_decay, optimizer, eps)
    given = {
        "batch_size": batch,
        "loss": loss,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "scale": scale,
        "noise": noise,
        "quantum": quantum,
        "time_limit": time_limit,
    }
    return invert(model, state, gradients, update, input_shape, given, training, device.resolve(), out, overwrite)


@app.command()
def sweep(
    model: Annotated[list[str], typer.Option(help="As for check; several are given one by one.")],
    images: Annotated[Path, typer.Option(help="A folder of pictures, a CIFAR or an MNIST folder.")],
    out: Annotated[Path, typer.Option(help="The table, in Parquet; one that is there is continued.")],
    input_shape: Shape = "3x32x32",
    batch: Batches = "1",
    defence: Annotated[list[str], typer.Option(help="NAME:STRENGTH, as gaussian:0.01; several one by one.")] = ["none"],  # noqa: B006
    noise: Annotated[list[float], typer.Option(help="Noise before the defence, relative; several one by one.")] = [0.0],  # noqa: B006
    n_images: Annotated[int | None, typer.Option(help="Take only so many pictures.")] = None,
    attack: Annotated[str | None, typer.Option(help="A baseline of rconv_fast.baselines instead of invert.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds for each inversion.")] = None,
    seed: Annotated[int, typer.Option(help="Of labels and noise.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes of this machine.")] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster: auto, or local.")] = None,
) -> int:
    """Invert pictures x models x batch sizes x defences x noise, one row each, resumable."""
    from rconv_fast.cli.sweeping import sweep

    return sweep(model, images, out, input_shape, batch, defence, noise, n_images, attack, time_limit, seed, jobs, ray)


@app.command()
def info() -> int:
    """Say what this binary was built with and what it finds here."""
    from rconv_fast._build_info import build_info

    width = max(map(len, build_info()))
    for key, value in build_info().items():
        screen.print_line(f"{key:{width}}  {screen.as_text(value)}")
    return 0
