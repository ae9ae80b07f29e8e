"""What the documentation shows runs, and everything a user calls is shown."""

import doctest
import importlib
import re
import shutil
from pathlib import Path

import jax
import pytest

from tests.cases import thinned

ROOT = Path(__file__).parent.parent
SETTING = ROOT / "docs" / "setting.md"
PAGES = sorted(set((ROOT / "docs").glob("*.md")) - {SETTING})


def name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {
    name(path): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "influence").rglob("*.py"))
}
SHOWN = [module for module, text in FILES.items() if ">>> " in text]

ELSEWHERE = {
    "influence.runtime.evaluating.comparing",  # docs/truth.md
    "influence.runtime.evaluating.responding",  # docs/truth.md
    "influence.truth.reweighting",  # tests/truth/test_reweighting.py
}
"""Of examples that take long, those whose calls are made elsewhere as well."""

PUBLIC = [
    *re.findall(r" as (\w+)\n", FILES["influence.__init__"]),
    "fold.Fold",
    "fold.lanes",
    "fold.run",
    "linalg.damping.FactoredTikhonov",
    "linalg.damping.Remaining",
    "linalg.damping.Travelled",
    "linalg.damping.Tikhonov",
    "linalg.damping.Truncated",
    "linalg.damping.implied",
    "model.examples.Examples.batches",
    "model.examples.Examples.take",
    "model.adapters.added",
    "model.adapters.merged",
    "model.generate.generate",
    "model.passes.count",
    "model.supervised.Classification",
    "model.supervised.Regression",
    "model.supervised.labelled",
    "model.optimizer.AdamW",
    "model.optimizer.SGD",
    "model.train.Training",
    "model.transformer.Apply",
    "model.transformer.Decoder",
    "curvature.covariance.PerSequence",
    "curvature.covariance.PerToken",
    "curvature.diagonal.diagonal",
    "curvature.diagonal.identity",
    "curvature.halves.halves",
    "curvature.kfac.kfac",
    "curvature.operator.Curvature.dense",
    "curvature.operator.Curvature.multiply",
    "curvature.operator.Curvature.filtered",
    "curvature.operator.Curvature.solve",
    "curvature.solvers.Exact",
    "curvature.solvers.LiSSA",
    "curvature.solvers.Neumann",
    "curvature.spectrum.spectrum",
    "curvature.unrolled.Unrolled",
    "curvature.unrolled.adam_scale",
    "attribution.cost.passes",
    "attribution.cost.subject",
    "attribution.corpus.reweighted",
    "attribution.corpus.without",
    "attribution.duplicates.near_duplicates",
    "attribution.forms.Joint",
    "attribution.forms.Plain",
    "attribution.forward.output_token_scores",
    "attribution.input_tokens.input_token_scores",
    "attribution.lexical.candidates",
    "attribution.measurements.Likelihood",
    "attribution.measurements.contrast",
    "attribution.measurements.mean",
    "attribution.measurements.measure",
    "attribution.measurements.likelihoods",
    "attribution.measurements.together",
    "attribution.metagradients.metagradients",
    "attribution.plan.cost",
    "attribution.scores.check_alike",
    "attribution.normalise.relatif",
    "attribution.normalise.unit",
    "attribution.query.Query",
    "attribution.query_tokens.query_tokens",
    "attribution.scores.Scores.bottom",
    "attribution.scores.Scores.top",
    "attribution.scores.Scores.total",
    "attribution.scores.standard_error",
    "attribution.self_influence.self_influence",
    "attribution.stages.stages",
    "attribution.tokens.concentrated",
    "attribution.sketch.leading",
    "attribution.sketch.logra",
    "attribution.sketch.random",
    "attribution.sketch.sketches",
    "attribution.sketch.trak",
    "attribution.unrolled.mean_params",
    "attribution.unrolled.segments",
    "attribution.unrolled.source",
    "attribution.unrolled.tracin",
    "truth.pbrf.pbrf",
    "truth.removal.check",
    "truth.detection.detected",
    "truth.detection.hits",
    "truth.detection.recall",
    "truth.correlation.pearson",
    "truth.lds.lds",
    "truth.retraining.Protocol",
    "truth.retraining.retrain",
    "truth.reweighting.contributions",
    "truth.reweighting.reweight",
    "truth.selection.select_damping",
    "truth.smoothness.metasmoothness",
    "truth.likeness.likeness",
    "truth.removal.curve",
    "runtime.corpus.pack.pack",
    "runtime.corpus.packed.Packed",
    "runtime.corpus.packed.Packed.batches",
    "runtime.corpus.packed.Packed.take",
    "runtime.corpus.packed.check_packed",
    "runtime.corpus.packed.read_packed",
    "runtime.corpus.source.check_source",
    "runtime.corpus.source.open_source",
    "runtime.corpus.texts.texts",
    "runtime.corpus.tokenizer.ModelTokenizer",
    "runtime.corpus.tokenizer.check_tokenizer",
    "runtime.checkpoints.adapt",
    "runtime.checkpoints.as_llama",
    "runtime.checkpoints.load",
    "runtime.checkpoints.merged",
    "runtime.checkpoints.save",
    "runtime.checkpoints.save_adapter",
    "runtime.driver.Driver",
    "runtime.evaluating.comparing.compare",
    "runtime.evaluating.experiment.read_experiment",
    "runtime.evaluating.judging.judge",
    "runtime.mesh.Layout",
    "runtime.mesh.Layout.shard",
    "runtime.mesh.layout",
    "runtime.recipes.read_recipe",
    "runtime.evaluating.removing.remove",
    "runtime.evaluating.responding.respond",
    "runtime.formats.read_curvature",
    "runtime.formats.read_query",
    "runtime.formats.read_scores",
    "runtime.formats.write_corpus",
    "runtime.formats.write_curvature",
    "runtime.formats.write_json",
    "runtime.formats.write_query",
    "runtime.formats.write_scores",
    "runtime.formats.write_text",
    "runtime.models.given",
    "runtime.models.open_model",
    "runtime.planning.kinds.device",
    "runtime.planning.planning.plan",
    "runtime.planning.rates.measure",
    "runtime.native.load_orbax",
    "runtime.native.save_orbax",
    "runtime.run.asking.query",
    "runtime.run.fitting.fit",
    "runtime.run.found.results",
    "runtime.run.scanning.scan",
    "runtime.run.showing.report",
    "runtime.run.showing.show",
    "runtime.run.showing.status",
    "runtime.store.Run",
]
"""What a user calls: the package's own names, and those one floor down."""


@pytest.fixture(scope="module", autouse=True)
def _jax_as_a_reader_has_it():
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@pytest.fixture(scope="module")
def begun(_jax_as_a_reader_has_it, tmp_path_factory):
    """The names of the page that describes the setting, and a copy of its files."""
    names = {}
    run(SETTING, names)
    copy = tmp_path_factory.mktemp("setting") / "copy"
    shutil.copytree(names["folder"], copy)
    yield names, copy
    shutil.rmtree(names["folder"])


@pytest.fixture
def setting(begun):
    """The names every example begins with; whatever others did to the files is gone."""
    names, copy = begun
    shutil.rmtree(names["folder"])
    shutil.copytree(copy, names["folder"])
    return names


def run(page, names):
    """Runs the Python of a page, block after block, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("module", thinned(SHOWN, set(SHOWN) - ELSEWHERE))
def test_examples_run(module, setting):
    # Only the setting, not the module's own names: what is pasted has to run too.
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(importlib.import_module(module), module, globs=setting)
    examples = [x for x in found if x.examples]
    assert len(examples) == FILES[module].count("Example:\n")
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for x in examples:
        runner.run(x, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_run(page, setting):
    run(page, dict(setting))


def test_everything_public_has_an_example():
    def documentation(path):
        at = importlib.import_module("influence")
        parts = path.split(".")
        for i, part in enumerate(parts):
            if not hasattr(at, part):
                importlib.import_module("influence." + ".".join(parts[: i + 1]))
            at = getattr(at, part)
        return at.__doc__ or ""

    assert not [x for x in PUBLIC if "Example:\n" not in documentation(x)]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_command_that_builds_the_documentation_is_one(page):
    command = "pdoc -d google influence -o "
    assert command in (ROOT / page).read_text("utf-8")


def test_the_documentation_s_modules_import():
    for module in FILES:
        importlib.import_module(module)
    # pdoc shows the setting on the first page: the docstring says from where.
    (shown,) = re.findall(r"\.\. include:: (\S+)\n", FILES["influence.__init__"])
    assert (ROOT / "influence" / shown).resolve() == SETTING


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", SETTING, *PAGES):
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8"))
        assert not [x for x in links if not (page.parent / x).exists()], page
