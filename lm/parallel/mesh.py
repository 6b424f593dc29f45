"""The device mesh: named axes in one order, size 1 when unused."""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from lm.core.errors import UsageError, check_choice
from lm.parallel.rules import MESH_AXES

# By name, the axes that have several devices: fsdp takes those of a slice that are left, the others 2 unless told.
# "auto" stands, where no axis is given, for what lm.plan.search chooses.
PRESETS: dict[str, tuple[str, ...]] = {
    "": (),
    "dp": (),
    "fsdp": ("fsdp",),
    "fsdp_tp": ("fsdp", "tensor"),
    "fsdp_cp": ("fsdp", "seq"),
    "fsdp_ep": ("fsdp", "expert"),
    "pp": ("stage",),
    "auto": (),
}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; `data=None` takes the devices that the others leave. `preset` is one of PRESETS.

    With `stage` > 1 the rows of a batch, or of each of its accumulated parts, go through the stages in `micro_batches`
    (None: as many as there are stages), and each stage holds `rounds` runs of layers, see lm.layers.pipeline.Schedule.
    """

    data: int | None = None
    fsdp: int = 1
    expert: int = 1
    seq: int = 1
    tensor: int = 1
    stage: int = 1
    slices: int = 1
    micro_batches: int | None = None
    rounds: int = 1
    preset: str = ""

    def __post_init__(self):
        for name in (*MESH_AXES, "slices", "micro_batches", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"mesh.{name}={value} must be at least 1")
        check_choice("mesh.preset", self.preset, PRESETS)
        if self.preset == "auto" and any((getattr(self, a) or 1) > 1 for a in MESH_AXES):
            object.__setattr__(self, "preset", "")  # Nothing is left to choose.
        if self.preset:
            self._check_preset()
            for axis in set(PRESETS[self.preset]) - {"fsdp"}:
                object.__setattr__(self, axis, max(2, getattr(self, axis)))
        if self.stage == 1 and (self.micro_batches is not None or self.rounds > 1):
            raise UsageError(
                f"mesh.micro_batches={self.micro_batches} and mesh.rounds={self.rounds} have no effect with "
                "mesh.stage=1: set mesh.stage or leave them out"
            )
        if self.stage % self.rounds and self.rounds % self.stage:
            raise UsageError(f"mesh.rounds={self.rounds} must divide mesh.stage={self.stage}, or be a multiple of it")
        if self.rounds > 1 and (self.micro_batches or 0) % self.stage:
            raise UsageError(
                f"mesh.rounds={self.rounds} needs a multiple of mesh.stage={self.stage} micro-batches, not "
                f"mesh.micro_batches={self.micro_batches}"
            )

    def sizes(self, devices: int) -> dict[str, int]:
        """{axis: size} for that many devices; raises UsageError where they do not divide."""
        given = {a: getattr(self, a) for a in MESH_AXES}
        if "fsdp" in PRESETS[self.preset] and self.fsdp == 1:
            given["data"] = self.data or self.slices
            given["fsdp"] = max(1, devices // math.prod(given.values()))
        others = math.prod(n for a, n in given.items() if a != "data")
        if given["data"] is None and devices % others:
            raise UsageError(f"mesh {_named(given)} needs a multiple of {others} devices, and there are {devices}")
        data = given["data"] or devices // others
        if data * others != devices:
            raise UsageError(
                f"mesh {_named(given)} covers {data * others} devices, and there are {devices}: "
                "leave mesh.data unset to take those that are left"
            )
        if data % self.slices:
            raise UsageError(f"mesh.slices={self.slices} does not divide mesh.data={data}")
        return given | {"data": data}

    def build(self, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The jax Mesh; over `slices` of a multi-slice system, data parallelism crosses the slow network."""
        devices = list(jax.devices() if devices is None else devices)
        sizes = self.sizes(len(devices))
        if self.slices > 1:
            within = [sizes[a] // (self.slices if a == "data" else 1) for a in MESH_AXES]
            across = [self.slices if a == "data" else 1 for a in MESH_AXES]
            array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
        else:
            wanted = [sizes[a] for a in MESH_AXES]
            array = mesh_utils.create_device_mesh(wanted, devices, allow_split_physical_axes=True)
        return jax.sharding.Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def _check_preset(self) -> None:
        for axis in MESH_AXES:
            if axis not in ("data", *PRESETS[self.preset]) and getattr(self, axis) > 1:
                raise UsageError(
                    f"mesh.{axis}={getattr(self, axis)} is no axis of mesh.preset={self.preset}: leave one of them out"
                )


def _named(given: dict[str, int | None]) -> str:
    return " x ".join(f"{a}={n}" for a, n in given.items() if n not in (None, 1)) or "data"


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the program being traced is compiled for, be it on another machine.

    That is the platform of the mesh in context, whose devices may be those of a topology without hardware; without
    a mesh, this machine's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


# What a jax Mesh has no place for goes beside it: like the mesh in context, it is part of what jit compiles for.
_settings = jax.make_user_context(Mesh())


def under(mesh: jax.sharding.Mesh, function: Callable, settings: Mesh = Mesh()) -> Callable:
    """`function`, traced and run with `mesh` in context, so that activations are constrained to it; of `settings`, that
    it was built from, the schedule of its stages counts."""

    def call(*arguments):
        with jax.set_mesh(mesh), _settings(settings):
            return function(*arguments)

    return call


def settings() -> Mesh:
    """Those in context."""
    return _settings.value
