"""One client's update, audited: what its weights before and after say of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rconv_fast.errors import RconvError
from rconv_fast.invert import invert
from rconv_fast.observation import SharedGradients
from rconv_fast.result import Inversion
from rconv_fast.updates import gradients_from_update
from rconv_fast.wrappers import working_copy


@dataclass(frozen=True)
class UpdateAudit:
    """What one update gave away.

    Attributes
    ----------
    round : int
        Of the federation.
    client : str
        Who sent it.
    verdict : str
        Of `Inversion`, or ``"failed"``.
    reason : str
        Where it stopped, or why it failed.
    inversion : Inversion or None
    """

    round: int
    client: str
    verdict: str
    reason: str
    inversion: Inversion | None = None

    @property
    def leaks(self) -> bool:
        """Whether inputs were recovered, all or some."""
        return self.verdict in ("exact", "approximate", "partial")

    def write(self, folder: Path) -> None:
        """A report as JSON and as a page, without the recovered inputs; files only their owner can read."""
        from rconv_fast.report import files, page, payload

        found = {"verdict": self.verdict, "reason": self.reason}
        about = {"round": self.round, "client": self.client}
        data = {**(found if self.inversion is None else payload.of_inversion(self.inversion)), **about}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"round-{self.round:03d}-client-{self.client}"
        files.save_report(folder / f"{name}.json", data)
        files.write_private(folder / f"{name}.html", page.render("inversion", data))


@dataclass(frozen=True)
class UpdateAuditor:
    r"""How the clients of a federation train, and how their updates are looked at.

    Attributes
    ----------
    model : nn.Module
        The architecture, in the mode of the clients' training; its parameters are not used.
    input_shape : sequence of int
        Shape of one sample.
    lr : float
        The clients' learning rate.
    steps : int
        Their local steps. Of more than one, only that the gradients are a mean is taken into account.
    momentum, weight_decay : float
    optimizer : {"sgd", "adam", "adamw"}
        Of Adam, made anew for each round, one step.
    eps : float
        Of Adam.
    loss : str
    batch_size : int or None
        Found if not given.
    time_limit : float
        Seconds an update.
    """

    model: nn.Module
    input_shape: Sequence[int]
    lr: float
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    optimizer: str = "sgd"
    eps: float = 1e-8
    loss: str = "cross_entropy"
    batch_size: int | None = None
    time_limit: float = 60.0

    def gradients(self, before: Any, after: Any) -> SharedGradients:
        """The gradients behind an update, with the noise that the rounding of the weights leaves."""
        return gradients_from_update(
            before,
            after,
            self.lr,
            steps=self.steps,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            optimizer=self.optimizer,
            eps=self.eps,
            parameters=[name for name, _ in self.model.named_parameters()],
        )

    def audit(self, server_round: int, client: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> UpdateAudit:
        """Recover what one update gives away; an error is a finding, never the end of a training."""
        try:
            dtype = next(value.dtype for value in before.values() if value.is_floating_point())
            model = working_copy(self.model, dtype)
            model.load_state_dict(before)
            found = invert(
                model,
                self.gradients(before, after),
                self.input_shape,
                batch_size=self.batch_size,
                loss=self.loss,
                time_limit=self.time_limit,
            )
        except (RconvError, RuntimeError, StopIteration) as error:
            return UpdateAudit(server_round, client, "failed", str(error))
        reason = found.reason or next(iter(found.notes), "")
        return UpdateAudit(server_round, client, found.verdict, reason, found)
