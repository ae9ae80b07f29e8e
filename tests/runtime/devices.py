"""What the laws of meshes are tested with: a process that has several devices.

python -m tests.runtime.devices OUT MESH…    scores on every mesh, with what is held
python -m tests.runtime.devices OUT          a scan of the run in OUT, on two processes
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)

LAYERS = ("blocks.q.*", "blocks.up.*", "head")

SIZE = 5
"""Sequences a batch: no number of lanes divides it."""


def start(out, *meshes, devices=1, number=None, port=0, dump=None):
    """Starts such a process, alone or as one of two."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    if dump:
        flags += f" --xla_dump_to={dump} --xla_dump_hlo_as_text"
        flags += " --xla_dump_hlo_module_re=jit__(update|read)"
    own = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    own["PYTHONPATH"] = str(ROOT)
    if number is not None:
        own["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        own |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    words = [sys.executable, "-m", "tests.runtime.devices", str(out), *meshes]
    said = (out / f"said-{number}.txt").open("wb")
    with said:
        return subprocess.Popen(words, cwd=ROOT, env=own, stdout=said, stderr=said)


def ended(process, out, number=None):
    """Waits for such a process; fails with what it said if it failed."""
    code = process.wait()
    assert not code, (out / f"said-{number}.txt").read_text(errors="replace")[-3000:]


def scored(case, measurements, here):
    """Returns scores, and per device the bytes of parameters, factors and queries."""
    from rich.console import Console

    import influence
    from influence.runtime.driver import Driver

    def cut(tree):
        return tree if here is None else here.shard(tree)

    driver, params = Driver(Console(quiet=True), here), cut(case.params)
    batches = case.examples.batches(SIZE)
    fitted = cut(
        influence.fit(case.task, params, batches, layers=LAYERS, run=driver.run)
    )
    query = cut(influence.query(fitted, params, measurements))
    scores = influence.scan(case.task, params, query, batches, run=driver.run)
    held = {"parameters": params, "curvature": fitted.blocks, "queries": query.forms}
    return scores.layers.values, {k: most(x) for k, x in held.items()}


def most(tree):
    """Returns the bytes of the device that holds most of a pytree."""
    import jax

    held = {}
    for x in {id(x): x for x in jax.tree.leaves(tree)}.values():
        for piece in x.addressable_shards:
            held[piece.device] = held.get(piece.device, 0) + piece.data.nbytes
    return max(held.values())


def dealt(here):
    """Returns on how many devices the items of a pass were worked on, and its value."""
    import jax.numpy as jnp
    from jax.core import Tracer
    from rich.console import Console

    from influence.fold import Items, each
    from influence.runtime.driver import Driver

    where = []

    def work(x):
        if not isinstance(x, Tracer):
            where.append(next(iter(x.devices())).id)
        return x * 2

    items = Items(
        take=lambda i: jnp.arange(4.0) + i,
        work=work,
        put=lambda state, i, x: {**state, i: x},
        cost=lambda i: 1.0 + i,
    )
    fold = each("doubling", dict, items)
    found = Driver(Console(quiet=True), here).run(fold, list(range(11)))
    value = {i: here.whole(x).tolist() for i, x in found.items()}
    return len(set(where)), value == {
        i: [2.0 * (i + j) for j in range(4)] for i in value
    }


def main(out, *meshes):
    """Carries out one of the two."""
    from influence.runtime.processes import join, leads

    join()
    import jax
    import numpy as np

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if not meshes:
        from influence.runtime.run.options import Scan
        from influence.runtime.run.scanning import scan
        from tests.runtime.run import make

        scan(Scan(out / "run", batch=4, save_every=0.0), make.QUIET, make.models())
        return
    import influence
    from influence.runtime.mesh import layout
    from tests import cases

    case = cases.case(cases.MAKERS["raw-scan"], bias=False)
    asked = {"a": ([1, 2], [3]), "b": ([4], [5, 6])}
    measurements = influence.completions(case.task, asked)
    several = jax.process_count() > 1
    if not several:
        np.save(out / "base.npy", scored(case, measurements, None)[0])
    for mesh in meshes:
        data, model = map(int, mesh.split("x"))
        here = layout(data, model, None if several else jax.devices()[: data * model])
        scores, held = scored(case, measurements, here)
        devices, right = dealt(here)
        if leads():
            np.save(out / f"{mesh}.npy", scores)
            about = {"held": held, "devices": devices, "right": right}
            (out / f"{mesh}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
