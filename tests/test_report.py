"""What a person sees of a result: pictures, the page, text, files, progress."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from rconv_fast.containers import read_state
from rconv_fast.errors import ArgumentError, RconvError
from rconv_fast.progress import Event, LogLines, ProgressDisplay
from rconv_fast.report import files, page, payload, pictures, png, text
from rconv_fast.result import Sample
from results import LAYER, exact, features


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_comparison_grows_with_the_batch_and_stays_small(tmp_path: Path, batch: int, channels: int) -> None:
    photos = torch.rand(batch, channels, 32, 32, dtype=torch.float64)
    pictures.save_comparison(tmp_path / "c.png", photos, photos + 1e-13)
    assert pixels(tmp_path / "c.png").shape == (341 * batch, 990, 3)
    assert (tmp_path / "c.png").stat().st_size < 200_000


def test_comparison_shows_the_photo_it_is_given(tmp_path: Path) -> None:
    """A red original and a blue recovered photo are found left and right of each other."""
    red, blue = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    red[:, 0], blue[:, 2] = 1, 1
    pictures.save_comparison(tmp_path / "c.png", red, blue)
    drawn = pixels(tmp_path / "c.png")
    is_red, is_blue = (drawn == (255, 0, 0)).all(axis=-1), (drawn == (0, 0, 255)).all(axis=-1)
    assert is_red.sum() > 20_000
    assert is_blue.sum() > 20_000
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min()


def test_comparison_survives_a_perfect_recovery(tmp_path: Path) -> None:
    photo = torch.rand(1, 3, 16, 16)
    pictures.save_comparison(tmp_path / "c.png", photo, photo)
    assert (tmp_path / "c.png").exists()


def test_comparison_refuses_different_shapes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="recovered must have shape"):
        pictures.save_comparison(tmp_path / "c.png", torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    "shape", [(1, 3, 32, 32), (5, 1, 8, 9), (2, 2, 6, 6), (1, 1, 4, 4, 4), (2, 3, 50), (1, 7), (20, 1, 4, 4)]
)
def test_batches_of_all_shapes_are_drawn(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pictures.save_batch(tmp_path / "b.png", exact(3 * torch.randn(shape)))
    assert pixels(tmp_path / "b.png").std() > 5
    assert (tmp_path / "b.png").stat().st_mode & 0o777 == 0o600


def test_the_verdict_is_stamped_on_the_picture(tmp_path: Path) -> None:
    """Two verdicts on the same samples differ in the rows above the samples, and nowhere else."""
    inputs = torch.rand(1, 3, 16, 16)
    pictures.save_batch(tmp_path / "a.png", exact(inputs))
    pictures.save_batch(tmp_path / "b.png", exact(inputs, verdict="partial", verified=False))
    rows = np.nonzero((pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")).any(axis=(1, 2)))[0]
    assert 0 < len(rows) < 30
    assert rows.max() < 40


def test_open_values_are_marked() -> None:
    sample, determined = torch.rand(3, 8, 8), torch.ones(3, 8, 8, dtype=torch.bool)
    determined[1, 2:4, 5] = False
    plain, marked = pictures.pixels(sample), pictures.pixels(sample, determined)
    changed = (plain != marked).any(axis=-1)
    assert np.argwhere(changed).tolist() == [[2, 5], [3, 5]]
    assert (marked[2, 5] // 2 >= np.array([100, 0, 90]) // 2).all()


def test_pixels_are_the_samples_values() -> None:
    sample = torch.tensor([0.0, 51 / 255, 1.0]).expand(3, 1, 3)
    assert pictures.pixels(sample)[0].tolist() == [[0] * 3, [51] * 3, [255] * 3]
    stretched = pictures.pixels(4 * sample - 2)
    assert stretched[0].tolist() == [[0] * 3, [51] * 3, [255] * 3]


def test_png_is_what_pillow_reads() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.encode(image)))), image)


class Page(HTMLParser):
    """What a page says, and that it fetches nothing and closes what it opens."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.said, self.images, self.open = "", 0, []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.images += tag == "img"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "href") or (value or "").startswith("data:image/png;base64,")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said += data + " "


def test_the_page_of_an_inversion_is_self_contained(tmp_path: Path) -> None:
    found = exact(torch.rand(2, 3, 8, 8), notes=["Mind the <gap> & more."])
    found.to_html(tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text()
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o600
    shown = Page(source)
    assert shown.images == 2
    assert "url(" not in source
    assert "prefers-color-scheme:dark" in source
    for words in (
        "exact",
        "verified",
        "Mind the <gap> & more.",
        "phase-cholesky",
        "sample 1, label 1",
        torch.__version__,
    ):
        assert words in shown.said


def test_the_page_says_where_it_stopped() -> None:
    shown = Page(page.render("inversion", payload.of_inversion(features())))
    assert shown.images == 0
    for words in ("features", "not verified", "pool", "a maximum hides where its values came from"):
        assert words in shown.said


def test_a_page_takes_what_an_audit_has() -> None:
    shown = Page(
        page.render(
            "audit",
            {
                "verdict": "not covered",
                "max_batch_size": 3,
                "advice": ["Use stride 1 in conv1."],
                "predicted_psnr": math.nan,
                "layers": [
                    {"name": "conv1", "determined": True, "phases": [{"rows": 3, "unknowns": 4}]},
                    {"name": "fc"},
                ],
                "pictures": [{"title": "leak map", "uri": png.data_uri(pictures.pixels(torch.rand(1, 4, 4)))}],
            },
        )
    )
    for words in ("That does not mean safe", "max batch size", "Use stride 1", "conv1", "rows 3; unknowns 4", "yes"):
        assert words in shown.said
    assert "psnr" not in shown.said


def test_text_says_verdict_labels_layers_and_notes() -> None:
    said = exact(torch.rand(2, 3, 8, 8), notes=["A note."]).summary()
    assert said.startswith("2 sample(s), labels [0, 1]: exact, verified, gradient residual 1e-15, 0.9 times the noise")
    assert f"{LAYER.name}  {LAYER.kind}" in said
    assert said.endswith("note: A note.")
    stopped = features().summary()
    assert stopped.startswith("1 sample(s), labels [3]: features, NOT verified, no inputs")
    assert "stops at pool: a maximum hides" in stopped
    counted = features(labels=None, batch_size=30, label_counts=torch.tensor([0, 20, 10]))
    assert counted.summary().startswith("30 sample(s), label counts 1: 20, 2: 10: features")
    samples = [Sample(1, 1e-15), Sample(4, 0.1, 2, "features", math.inf)]
    assert "features    inf" in exact(torch.rand(2, 4), samples=samples, verdict="partial").summary()
    assert "token ids in the batch: [4, 9]" in features(tokens=torch.tensor([4, 9])).summary()


def test_a_table_is_aligned() -> None:
    assert text.table(("name", "n"), [("conv1", "5"), ("fc", "12345")]) == [
        "name       n",
        "conv1      5",
        "fc     12345",
    ]


def test_json_has_a_schema_and_no_values(tmp_path: Path) -> None:
    found = exact(torch.rand(2, 3, 8, 8), gradient_residual=math.inf)
    written = found.to_json(tmp_path / "r.json")
    assert written == (tmp_path / "r.json").read_text()
    data = json.loads(written)
    assert data["schema"] == "rconv_fast.inversion/1"
    assert data["shape"] == [2, 3, 8, 8]
    assert data["gradient_residual"] is None
    assert data["samples"][1]["label"] == 1
    assert data["predicted_error"] == pytest.approx(1e-12, rel=1e-5)
    assert len(written) < 3000


def test_tensors_come_back_from_both_kinds_of_file(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "t.safetensors")
    torch.save(tensors, tmp_path / "t.pt")
    torch.save(list(tensors.values()), tmp_path / "list.pt")
    for name in ("t.safetensors", "t.pt"):
        loaded = files.load_tensors(tmp_path / name, "--state")
        assert isinstance(loaded, dict)
        assert set(loaded) == {"a", "b"}
        assert torch.equal(loaded["a"], tensors["a"])
    loaded = files.load_tensors(tmp_path / "list.pt", "--state")
    assert isinstance(loaded, list)
    assert torch.equal(loaded[1], tensors["b"])


class Trap:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["bare.pkl", "torch.pt", "named.safetensors", "named.npz"])
def test_no_file_is_ever_unpickled(tmp_path: Path, name: str) -> None:
    trap = Trap(tmp_path / "sprung")
    if name == "named.npz":
        np.savez(tmp_path / name, w=np.array([trap], dtype=object), allow_pickle=True)
    elif name == "torch.pt":
        torch.save({"w": trap}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps({"w": trap}))
    with pytest.raises(ArgumentError, match=r"--state must be safetensors, npz or loadable") as caught:
        files.load_tensors(tmp_path / name, "--state")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("n_files", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, n_files: int) -> None:
    """Whole files cut short, with other bytes in them, or all noise: read, or one line; nothing else."""
    tensors, generator = {"a": torch.rand(3, 4), "b": torch.arange(5)}, random.Random(0)
    save_file(tensors, tmp_path / "t.safetensors")
    np.savez(tmp_path / "t.npz", **{name: t.numpy() for name, t in tensors.items()})
    torch.save({"state_dict": tensors, "epoch": 1}, tmp_path / "t.pt")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(n_files):
        name = generator.choice(sorted(whole))
        data = bytearray(whole[name])
        for place in generator.sample(range(len(data)), generator.randint(1, 6)):
            data[place] = generator.randrange(256)
        (tmp_path / name).write_bytes(bytes(data[: generator.choice([len(data), generator.randrange(len(data))])]))
        said = ""
        try:
            read_state("f", "state", files.load_tensors(tmp_path / name, "--state"), ["a", "b"])
        except RconvError as error:
            said = str(error)
        assert "\n" not in said


def test_other_contents_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "t.pt")
    with pytest.raises(ArgumentError, match="--gradients must hold a mapping of names to tensors"):
        files.load_tensors(tmp_path / "t.pt", "--gradients")
    with pytest.raises(ArgumentError, match="--gradients must be a file, got"):
        files.load_tensors(tmp_path / "absent.pt", "--gradients")


def test_tensors_are_saved_whole_and_private(tmp_path: Path) -> None:
    inputs = torch.rand(2, 3, 4, 4, dtype=torch.float64).transpose(2, 3)
    (tmp_path / "i.safetensors").write_text("an older file that everybody reads")
    (tmp_path / "i.safetensors").chmod(0o644)
    files.save_tensors(tmp_path / "i.safetensors", {"inputs": inputs, "labels": torch.tensor([3, 1]), "none": None})
    loaded = load_file(tmp_path / "i.safetensors")
    assert set(loaded) == {"inputs", "labels"}
    assert torch.equal(loaded["inputs"], inputs)
    assert (tmp_path / "i.safetensors").stat().st_mode & 0o777 == 0o600
    files.save_tensors(tmp_path / "j.safetensors", {"labels": None})
    assert not (tmp_path / "j.safetensors").exists()


def test_report_is_strict_json(tmp_path: Path) -> None:
    report = {
        "psnr": math.inf,
        "labels": torch.tensor([1, 2]),
        "dtype": torch.float64,
        "layers": [{"r": math.nan}],
    }
    files.save_report(tmp_path / "r.json", report)
    text = (tmp_path / "r.json").read_text()
    expected = {"psnr": None, "labels": [1, 2], "dtype": "torch.float64", "layers": [{"r": None}]}
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == expected


def test_progress_shows_layer_share_time_left_and_residual() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=140)
    with ProgressDisplay(console) as show:
        show(Event("conv3", "solve", 1))
        show(Event("conv2", "solve", 10, 40, 1.5e-3))
        show._progress.refresh()
    for words in ("conv3", "10/40", "25%", "residual 1.5e-03", "left"):
        assert words in stream.getvalue()


@pytest.mark.parametrize(
    ("event", "share"),
    [
        (Event("a", "s"), None),
        (Event("a", "s", 3, 4), 0.75),
        (Event("a", "s", 9, None, 7.0), 0.0),
        (Event("a", "s", 9, None, 10**-7.5), 0.5),
        (Event("a", "s", 9, None, 1e-16), 1.0),
    ],
)
def test_the_share_is_of_iterations_or_of_the_way_to_rounding(event: Event, share: float | None) -> None:
    assert event.share == (share if share is None else pytest.approx(share))


def test_progress_is_silent_in_a_file() -> None:
    stream = io.StringIO()
    with ProgressDisplay(Console(file=stream)) as show:
        show(Event("conv2", "solve", 5, 40, 1.5e-3))
    assert stream.getvalue() == ""


def test_log_lines_come_when_a_layer_is_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rconv_fast"):
        with LogLines() as show:
            show(Event("conv2", "factor"))
            show(Event("conv2", "solve", 5, 40, 1.5e-3))
            assert caplog.records == []
            show(Event("conv1", "factor"))
            assert len(caplog.records) == 1
        assert [r.getMessage().rpartition(", ")[0] for r in caplog.records] == [
            "conv2: solve, 5 iterations, residual 1.5e-03",
            "conv1: factor",
        ]
