"""Models as users hold them: out of their wrappers, and as a working copy that no hook and no optimiser knows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

# The attribute in which torch.compile, DataParallel and DDP, and Opacus' GradSampleModule hold the model itself.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AbstractGradSampleModule": "_module",
    "GradSampleModule": "_module",
}
_COMPILED = "_compiled_call_impl"  # what Module.compile() leaves in a module: it would run the original


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DDP, ``torch.compile`` or Opacus' GradSampleModule, however deep.

    Examples
    --------
    >>> type(unwrap(torch.nn.DataParallel(torch.nn.Linear(2, 1)))).__name__
    'Linear'
    """
    for kind in type(model).__mro__:
        inside = getattr(model, _INSIDE.get(kind.__name__, ""), None)
        if kind.__module__.split(".")[0] in ("torch", "opacus") and isinstance(inside, nn.Module):
            return unwrap(inside)
    return model


def working_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """An independent copy to compute with: unwrapped, without hooks and gradients, floating values in `dtype`.

    Weight norm (the old one and the parametrisation) is folded into plain weights, as `rconv_fast.received` folds
    its gradients. Kept activations are copied as constants; what cannot be copied (locks, streams, process groups)
    is shared. `model` is left as it is, and none of its hooks runs.

    Parameters
    ----------
    model : nn.Module
        Wrapped or not.
    dtype : torch.dtype
        Of all floating parameters, buffers and constants of the copy.
    """
    return _plain(model, dtype, lambda value: _converted(value, dtype))


def reading_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A `working_copy` whose parameters share the model's memory where they have that dtype: not to be written to."""

    def lent(value: Tensor) -> Tensor:
        return (
            value.detach().to(dtype)
            if isinstance(value, nn.Parameter) and value.is_floating_point()
            else _converted(value, dtype)
        )

    return _plain(model, dtype, lent)


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules in the same modes on the meta device: shapes and dtypes, no values, no hooks, no memory."""
    return _twin(model, {}, lambda value: torch.empty_like(value, device="meta"))


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by name in ``model.parameters()`` order, as if nothing in the model were wrapped.

    A parameter that is used twice has both its names.
    """
    return dict(_named(unwrap(model), ""))


@dataclass(frozen=True)
class WeightNorm:
    r"""A weight that is stored as its length and direction: ``W = g v / ||v||``, one norm for each entry of g.

    Attributes
    ----------
    name : str
        Of the weight in its module.
    length, direction : str
        Names of g and v in the module.
    dim : int or None
        The axis that the norm is not over.
    """

    name: str
    length: str
    direction: str
    dim: int | None

    def weight(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight itself."""
        return g * v / self.norm(v)

    def gradient(self, g: Tensor, v: Tensor, grad_g: Tensor, grad_v: Tensor) -> Tensor:
        r"""Gradient of the weight: with ``u = v / ||v||``, ``dg = <dW, u>`` and ``dv = g/||v|| (dW - dg u)``."""
        norm = self.norm(v)
        return grad_v * norm / g + grad_g * v / norm

    def deviation(self, g: Tensor, v: Tensor, sigma_g: Tensor, sigma_v: Tensor) -> Tensor:
        """Standard deviation of each entry of `gradient`, from those of its two parts."""
        norm = self.norm(v)
        return torch.hypot(sigma_v * norm / g, sigma_g * v / norm)

    def norm(self, v: Tensor) -> Tensor:
        """Norm over all axes but `dim`, which stay with size 1."""
        axes = [axis for axis in range(v.ndim) if self.dim is None or axis != self.dim % v.ndim]
        norm = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()
        return norm if self.dim is not None else norm.reshape(())

    def fold(self, original: nn.Module, module: nn.Module, dtype: torch.dtype) -> None:
        """Turn `module`, a copy of `original`, into one with a plain weight."""
        g, v = (original.get_parameter(name).detach().to(dtype) for name in (self.length, self.direction))
        trained = any(original.get_parameter(name).requires_grad for name in (self.length, self.direction))
        if "parametrizations" in module._modules:
            lists = module.parametrizations
            assert isinstance(lists, nn.ModuleDict)
            del lists[self.name]
            if not len(lists):
                del module._modules["parametrizations"]
                module.__class__ = type(module).__bases__[0]
        else:
            del module._parameters[self.length], module._parameters[self.direction]
            module.__dict__.pop(self.name, None)
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "name", None) == self.name:
                    del module._forward_pre_hooks[key]
        module.register_parameter(self.name, nn.Parameter(self.weight(g, v), requires_grad=trained))


def weight_norms(module: nn.Module) -> Iterator[WeightNorm]:
    """The weights of this one module that are under weight norm and nothing else."""
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    for hook in hooks:
        if type(hook).__name__ == "WeightNorm" and _is_torchs(hook):
            yield WeightNorm(hook.name, f"{hook.name}_g", f"{hook.name}_v", _axis(hook.dim))
    lists = getattr(module, "parametrizations", None)
    for name, steps in lists.items() if isinstance(lists, nn.ModuleDict) else ():
        if len(steps) == 1 and type(steps[0]).__name__ == "_WeightNorm":  # type: ignore[arg-type, index]
            place = f"parametrizations.{name}.original"
            yield WeightNorm(name, f"{place}0", f"{place}1", _axis(steps[0].dim))  # type: ignore[index]


def _axis(dim: Any) -> int | None:
    return None if dim is None or dim == -1 else int(dim)


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules, without the wrappers among them."""
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        module = unwrap(module)
        if id(module) not in found:
            found[id(module)] = module
            for child in module._modules.values():
                if child is not None:
                    visit(child)

    visit(model)
    return list(found.values())


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(prefix.rstrip("."), recurse=False, remove_duplicate=False)
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(unwrap(child), f"{prefix}{name}.")


def _plain(model: nn.Module, dtype: torch.dtype, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy without hooks whose weights are under no weight norm."""
    memo: dict[int, Any] = {}
    twin = _twin(model, memo, convert)
    for original in _modules(model):
        for norm in weight_norms(original):
            norm.fold(original, memo[id(original)], dtype)
    return twin.to(dtype)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach()
    return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()


def _twin(module: nn.Module, memo: dict[int, Any], convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a module: `memo` (as of copy.deepcopy) holds what has been copied by then."""
    module = unwrap(module)
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):  # these make their classes themselves
        return _without_hooks(copy.deepcopy(module, memo))
    twin = object.__new__(type(module))
    memo[id(module)] = twin
    state = dict(vars(module))
    state.pop(_COMPILED, None)
    for tensors in (module._parameters, module._buffers):
        memo.update({id(t): _tensor(t, convert) for t in tensors.values() if t is not None and id(t) not in memo})
    state["_modules"] = type(module._modules)(
        (name, None if child is None else _twin(child, memo, convert)) for name, child in module._modules.items()
    )
    for name, value in state.items():
        if name == "_forward_pre_hooks":
            twin.__dict__[name] = type(value)((key, hook) for key, hook in value.items() if _is_torchs(hook))
        elif "_hooks" in name and isinstance(value, Mapping):
            twin.__dict__[name] = type(value)()
        elif name == "_modules":
            twin.__dict__[name] = value
        else:
            twin.__dict__[name] = _attribute(value, memo, convert)
    return twin


def _tensor(tensor: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
    value = convert(tensor)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _attribute(value: Any, memo: dict[int, Any], convert: Callable[[Tensor], Tensor]) -> Any:
    """A copy of an attribute; the attribute itself where it has none or needs none."""
    if value is None or isinstance(value, str | int | float):
        return value
    _remember_tensors(value, memo, convert)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever the object's own code raises
        return value


def _remember_tensors(value: Any, memo: dict[int, Any], convert: Callable[[Tensor], Tensor]) -> None:
    """Copy the tensors and modules in nested lists and dicts, which deepcopy would refuse or not convert."""
    waiting, seen = [value], set()
    while waiting:
        entry = waiting.pop()
        if id(entry) in memo or id(entry) in seen:
            continue
        seen.add(id(entry))
        if isinstance(entry, Tensor):
            memo[id(entry)] = _tensor(entry, convert)
        elif isinstance(entry, nn.Module):
            _twin(entry, memo, convert)
        elif isinstance(entry, Mapping):
            waiting += entry.values()
        elif isinstance(entry, list | tuple | set):
            waiting += entry


def _is_torchs(hook: Any) -> bool:
    """Whether a hook is part of what the module computes: torch's old weight norm, spectral norm, pruning."""
    return type(hook).__module__.startswith("torch.nn.utils")


def _without_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                value.clear()
    return model
