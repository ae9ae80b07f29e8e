"""A model, and text in sequences, as every command on dictionaries begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
from rich.console import Console

from influence.interpret.source import Source
from influence.model.sites import Address, addresses, read
from influence.runtime.corpus.packed import Packed, PackedBatches
from influence.runtime.dictionaries import sites
from influence.runtime.dictionaries.stored import Stored
from influence.runtime.driver import Driver
from influence.runtime.models import Model
from influence.runtime.run.job import MODEL, Job, Models
from influence.runtime.run.ledger import DICTIONARIES, Ledger, begin
from influence.runtime.run.options import Fit
from influence.runtime.run.packing import sample
from influence.runtime.sae.options import Read
from influence.types import Inputs

TOKENS = 4096
"""Of a batch of sequences, about."""


@dataclass(frozen=True)
class Reading:
    """A model and what it reads.

    Attributes:
      job: what the corpus is packed by, and passes are carried out by.
      model: the model.
      packed: the corpus in sequences.
      digest: of the corpus and of how it was packed.
    """

    job: Job
    model: Model
    packed: Packed
    digest: str

    @property
    def source(self) -> Source:
        """Returns the model as activations are read from it."""
        tokenizer = self.model.tokenizer
        special = (tokenizer.bos, tokenizer.pad) if tokenizer else ()
        ids = tuple(sorted({x for x in special if x is not None}))
        return Source(self.model.task, self.model.params, ids)

    @property
    def size(self) -> int:
        """Returns how many sequences make a batch."""
        return max(1, TOKENS // self.packed.context)

    def batches(self, packed: Packed) -> PackedBatches:
        """Returns sequences in batches."""
        return self.job.batches(packed, self.size)

    def some(self, count: int, seed: int) -> Packed:
        """Returns some of the sequences, drawn by a seed."""
        return sample(self.packed, count, seed)

    @property
    def inputs(self) -> Inputs:
        """Returns one sequence, as the model reads it."""
        return next(iter(self.batches(self.packed.take([0])))).inputs

    def site(self, text: str) -> Address:
        """Returns a site of the model, from our name or TransformerLens'.

        Raises:
          ValueError: if the model has none such.
        """
        return site_of(self.model, self.inputs, text)

    def width(self, site: Address) -> int:
        """Returns how many numbers a site holds at a position."""
        return width_of(self.model, self.inputs, site)


def site_of(model: Model, inputs: Inputs, text: str) -> Address:
    """Returns a site of a model, from our name or TransformerLens'.

    Raises:
      ValueError: if the model has none such.
    """
    known = addresses(model.task.outputs, model.params, inputs)
    found = Address.parse(sites.from_transformer_lens(text, known.get("resid")))
    if found == Address("resid", known.get("resid", -1)) and "resid_final" in known:
        return Address("resid_final")
    return found


def width_of(model: Model, inputs: Inputs, site: Address) -> int:
    """Returns how many numbers a site holds at a position.

    Raises:
      ValueError: if there is no such site, or it holds something else.
    """
    found = jax.eval_shape(read(model.task.outputs, (site,)), model.params, inputs)
    shape = found[site].shape
    if len(shape) != 3 or shape[:2] != inputs["tokens"].shape:
        raise ValueError(
            f"The site {str(site)!r} has shape {shape}, not a vector for each token of "
            f"{inputs['tokens'].shape}. Choose another, such as resid or mlp_out."
        )
    return shape[-1]


def open_reading(
    options: Read, ledger: Ledger, console: Console, given: Models
) -> Reading:
    """Returns a model and its corpus, packed into a folder with a ledger."""
    fit = Fit(
        ledger.run.folder,
        options.model,
        options.data,
        options.packing,
        dtype=options.dtype,
    )
    job = Job(ledger, fit, given, console, Driver(console))
    job.check_models()
    model = job.model(MODEL)
    corpus = job.pack(model, options.data)
    return Reading(job, model, corpus.packed, corpus.digest)


@contextmanager
def read_once(options: Read, console: Console, given: Models) -> Iterator[Reading]:
    """Opens a model and its corpus, which is packed into a folder that goes again."""
    with TemporaryDirectory() as folder:
        ledger = begin(Path(folder) / "read", DICTIONARIES)
        yield open_reading(options, ledger, console, given)


def split(packed: Packed, share: float, seed: int) -> tuple[Packed, Packed]:
    """Returns sequences to learn from, and others that are held out.

    Raises:
      ValueError: if one of the parts would be empty.
    """
    count = round(share * len(packed))
    if not 0 < count < len(packed):
        raise ValueError(
            f"The corpus has {len(packed)} sequences, of which a share of {share:g} is "
            f"to be held out: {count}. Give a longer corpus, or another share."
        )
    order = np.random.default_rng(seed).permutation(len(packed))
    return packed.take(np.sort(order[count:])), packed.take(np.sort(order[:count]))


def check_stored(stored: Stored, reading: Reading) -> None:
    """Raises unless a dictionary is of a model.

    Raises:
      ValueError: saying what differs.
    """
    site = reading.site(stored.about.site)
    writes = site
    if stored.about.writes is not None:
        writes = reading.site(stored.about.writes)
    check_sites(stored, reading.model, reading.inputs, site, writes)


def check_sites(
    stored: Stored, model: Model, inputs: Inputs, site: Address, writes: Address
) -> None:
    """Raises unless a dictionary is of a model and of two of its sites.

    Raises:
      ValueError: saying what differs.
    """
    stored.check_fits(
        reads=width_of(model, inputs, site),
        writes=width_of(model, inputs, writes),
        digest=model.digest,
    )
