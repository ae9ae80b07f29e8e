"""What the README tells a user to type works."""

import re
from pathlib import Path

import jax.numpy as jnp

from tests import cases

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    case = cases.case(cases.MAKERS["nnx-scan"], False, jnp.float32)
    inputs = case.examples.inputs
    names = {
        "apply": case.task.apply,
        "params": case.params,
        "tokens": [x[y].tolist() for x, y in zip(*inputs.values(), strict=True)],
        "ids": case.examples.ids,
        "prompt": [1, 2],
        "completion": [3],
    }
    exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "embedding:embed.embedding" in printed
    assert "greeting (nats per added copy)" in printed
    assert printed.count("text-0-") == 5
    assert names["scores"].layers.dims == ("query", "train", "layer")


def test_ci_runs_the_readme_s_test_command():
    command = "pip install -e '.[test]' && pytest"
    assert f"    {command}\n" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
