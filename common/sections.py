"""The tables of a ``run.toml``, one class each, typed and documented; :mod:`common.config` joins them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from common.algorithms import LOCAL_RULES
from common.errors import did_you_mean

EXAMPLE = "example"
"""The privacy unit of which every row is one."""

# Strict: true is not 1, and "8" is not 8.
Positive = Annotated[float, Field(gt=0, strict=True)]
Fraction = Annotated[float, Field(gt=0, le=1, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]


class Section(BaseModel):
    """Base of all settings: frozen, and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    """``[run]``: what this run is called and its public seed."""

    name: str = Field(default="consilium", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name shown in reports. Letters, digits, dot, dash, underscore."""
    seed: int = Field(default=0, ge=0)
    """Seeds what is public only: initialisation of the adapter and cohorts. Never sampling or noise at a site."""


class ModelSection(Section):
    """``[model]``: the frozen base model."""

    name: str = "minilm"
    """``minilm`` (ships with the package index), a local folder, or a hub id."""
    revision: str | None = None
    """Hub revision; ignored for local folders."""


class TaskSection(Section):
    """``[task]``: what is learnt. Labels and templates come from here, never from private data."""

    name: str = "sequence-classification"
    """``sequence-classification`` or ``causal-lm``."""
    labels: tuple[str, ...] = ()
    """Sequence classification: all label names in the order of their ids."""
    max_length: int = Field(default=128, ge=8, le=8192)
    """Longest encoded example in tokens; longer ones are cut."""
    pooling: Literal["auto", "mean", "cls", "last", "model"] = "auto"
    """How token states become one feature vector. ``auto``: ``mean`` where the model's own files say it was trained so,
    ``last`` for decoders, else ``model`` (the stock head's own way; its features cannot be cached)."""
    feature_map: Literal["auto", "none", "held-out-texts"] = "auto"
    """What the head sees. ``none``: the pooled states of the last layer. ``held-out-texts``: the pooled states of the
    top ``feature_levels`` levels, joined and brought to ``feature_rank`` coordinates by a public linear map, which the
    server takes from its own held-out texts (without their labels); fewer coordinates means less noise under DP.
    ``auto``: ``held-out-texts`` with the default recipe, where the model and its pooling allow it."""
    feature_levels: Count = 3
    """Levels of hidden states that the map joins, counted from the top."""
    feature_rank: Count | None = None
    """Coordinates that the map keeps, at most the width of the model. Empty: 128 under DP, where each pays in noise,
    and 192 without."""
    head_init: Literal["label-names", "zero"] = "label-names"
    """How the classification head starts: from the embeddings of the label names (public text), or at zero."""
    head_scale: Positive | None = None
    """Norm of each row of a head initialised from label names. Empty: 3 with a feature map, else 1."""
    prompt_template: str = "{prompt}\n"
    """Causal LM: text before the completion; ``{prompt}`` is replaced. ``chat`` uses the tokenizer's chat template."""

    @property
    def maps_features(self) -> bool:
        """Whether a public linear map stands before the head."""
        return self.feature_map == "held-out-texts"

    @model_validator(mode="after")
    def _consistent(self) -> TaskSection:
        if self.name == "sequence-classification":
            if len(self.labels) < 2:
                raise ValueError("labels: at least two label names are needed for sequence-classification")
            if len(set(self.labels)) != len(self.labels):
                raise ValueError("labels: a label name appears twice")
        if self.name == "causal-lm" and self.prompt_template != "chat" and "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template: must contain {prompt}, or be 'chat'")
        return self


class DataSection(Section):
    """``[data]``: which data set a plan asks for, and where a *simulation* finds it."""

    name: str = Field(default="default", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """A plan's name for the data; selects ``[data.NAME]`` in each site's own ``site.toml``."""
    path: str | None = None
    """Simulation: a folder with train/validation/test files (csv, jsonl, parquet), one file, or a hub data set id."""
    columns: dict[str, str] = Field(default_factory=dict)
    """The task's fields → column names, e.g. ``{text = "note", label = "class"}``. Default: the field's own name."""
    site_column: Annotated[str | None, BeforeValidator(lambda value: None if value == "" else value)] = None
    """Simulation: the column whose value names the site (the natural partition). Empty: none."""
    privacy_unit: str | None = None
    """Simulation: the column that names each row's privacy unit, e.g. ``patient_id``. Empty: each row is one."""
    sites: Count | None = None
    """Simulation: without ``site_column``, split the rows into so many sites as ``partition`` says (seeded by
    ``run.seed``)."""
    partition: Literal["iid", "dirichlet", "pathological", "linear", "square", "exponential"] = "iid"
    """Simulation: how the rows are split into ``sites``. ``iid``: dealt out at random, in equal parts. ``dirichlet``:
    each label's rows are shared out in proportions drawn from a Dirichlet distribution (``alpha``). ``pathological``:
    each site has rows of ``classes_per_site`` labels only. ``linear``, ``square``, ``exponential``: at random, in parts
    that grow as k, k² or eᵏ. All rows of a privacy unit go to one site; its label is its most frequent one."""
    alpha: Positive | None = None
    """``dirichlet``: concentration of the proportions. Small: nearly each label at a site of its own; large: IID."""
    classes_per_site: Count | None = None
    """``pathological``: how many different labels each site has."""
    min_size: Count = 1
    """Privacy units that each of the ``sites`` must get at least; a draw that gives less is drawn again."""

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.site_column is not None and (self.sites is not None or self.partition != "iid" or self.min_size > 1):
            raise ValueError(
                f"site_column = '{self.site_column}': says which rows belong to which site; leave it out, or leave out "
                "sites, partition and min_size"
            )
        if self.sites is None and (self.partition != "iid" or self.min_size > 1):
            raise ValueError(f"sites: is missing; partition = '{self.partition}' needs the number of sites")
        for field, partition in (("alpha", "dirichlet"), ("classes_per_site", "pathological")):
            value = getattr(self, field)
            if value is None and self.partition == partition:
                raise ValueError(f"{field}: is missing; partition = '{partition}' needs it")
            if value is not None and self.partition != partition:
                raise ValueError(f"{field} = {value}: belongs to partition = '{partition}'; set that, or leave it out")
        return self


class LoraSection(Section):
    """``[lora]``: the adapter's shape."""

    r: Count = 8
    """Rank."""
    alpha: Positive = 16.0
    """Scale numerator: an adapter adds ``alpha / r · B A`` (``alpha / sqrt(r) · B A`` with ``use_rslora``)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input; without privacy only. The masks of a step come from one stream, so that one unit
    more would change those of all others."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear modules that get an adapter. Empty: attention query and value of the model's family."""
    layers: Count | None = None
    """Adapt only the top so many layers. Empty: all layers."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732)."""

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied by."""
        return self.alpha / (sqrt(self.r) if self.use_rslora else self.r)

    def at_rank(self, rank: int) -> LoraSection:
        """The same adapter at another rank and the same scale."""
        if rank == self.r:
            return self
        return self.model_copy(update={"r": rank, "alpha": self.scale * (sqrt(rank) if self.use_rslora else rank)})


class PrivacySection(Section):
    """``[privacy]``: what each site is promised for the whole run."""

    mechanism: Literal["dp-sgd", "none"] = "dp-sgd"
    """``dp-sgd`` (default), or ``none``: no privacy, loudly reported."""
    epsilon: Positive | None = 8.0
    """ε of all rounds of all phases together, at each site, under add/remove of one unit."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """δ. Empty: the largest power of ten not above 1/(10·public_size), never above 1e-5, at each site."""
    unit: str = Field(default=EXAMPLE, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """What one unit is: ``example``, or the name of a group of examples (``patient``) that a site must protect under
    the same name. In a simulation ``data.privacy_unit`` names it."""
    max_examples_per_unit: Annotated[int, Field(ge=1, le=256, strict=True)] = 8
    """A unit contributes the mean gradient of at most so many of its examples, drawn afresh in each step."""
    noise: Literal["secure", "fast"] = "secure"
    """``secure``: fit for release, on an integer grid. ``fast``: floating point, for simulations; real sites refuse
    it."""
    metrics: tuple[Literal["loss", "accuracy"], ...] = ()
    """What each site tells of its own training examples in a round, with noise, within the same ε: their mean ``loss``,
    cut at 2·ln(number of labels or tokens), and ``accuracy`` (causal LM: of the completion's tokens). Each site's
    policy must list them."""
    metrics_share: Annotated[float, Field(gt=0, le=0.5, strict=True)] = 0.05
    """Share of each step's budget, as a ratio of μ², that the metrics together get; the gradient gets the rest."""

    @model_validator(mode="after")
    def _consistent(self) -> PrivacySection:
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metrics: a metric appears twice")
        if self.mechanism == "dp-sgd" and self.epsilon is None:
            raise ValueError("epsilon: must be given with mechanism = 'dp-sgd'; or set mechanism = 'none'")
        return self


class PhaseSection(Section):
    """One ``[[phase]]``: what is trained, for how many rounds and steps, with which share of the budget."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    rounds: Count
    """Rounds of this phase."""
    steps: Count = 1
    """Local steps of a site in each round."""
    sample_rate: Fraction | None = None
    """Poisson sampling rate q of a unit per step; 1 takes every unit. Exactly one of this and ``batch_size``."""
    batch_size: Count | None = None
    """Expected batch; q = batch_size / public_size at each site. Exactly one of this and ``sample_rate``."""
    train: tuple[Literal["head", "lora"], ...] = ("lora",)
    """What is trained. Whether A or B of the LoRA pair is the algorithm's choice."""
    layers: Count | None = None
    """Train the adapters of only the top so many layers. Empty: all that ``[lora]`` adapts."""
    algorithm: str = "ffa"
    """Aggregation: ``ffa``, ``fedit``, ``fedsvd``, ``rolora``, ``la-lora``, ``flexlora`` or ``fedex``."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Local optimiser, fresh in each round."""
    learning_rate: Positive = 0.1
    """Local learning rate."""
    proximal: float = Field(default=0.0, ge=0)
    """FedProx (Li et al. 2018, arXiv 1812.06127): μ of the pull μ(θ - θ_received) on each local step; 0 for none."""
    smoothing: float = Field(default=0.0, ge=0, le=16)
    """Width of the Gaussian low-pass filter over the noised gradient's entries, in entries; 0 for none
    (post-processing: free under DP). Meant for ``la-lora``."""
    clip_norm: Positive = 1.0
    """Per-unit gradients are clipped to this Euclidean norm."""
    budget_share: Positive = 1.0
    """Share of the privacy budget relative to the other phases, as a ratio of μ² (Gaussian DP; splitting only)."""
    combine: Literal["mean", "median", "trimmed-mean", "multi-krum"] = "mean"
    """How the updates of a round become one: their weighted mean, or a rule that some hostile sites cannot win. The
    robust rules count every site once, whatever ``server.weights`` says."""
    hostile_sites: int = Field(default=1, ge=0, strict=True)
    """How many hostile sites ``trimmed-mean`` and ``multi-krum`` must withstand; the other rules ignore it."""
    server_optimizer: Literal["sgd", "adam", "yogi"] = "sgd"
    """What the server does with the combined update (post-processing: free under DP): ``sgd`` (with
    ``server_momentum``: heavy ball), FedAdam or FedYogi (Reddi et al. 2021, arXiv 2003.00295)."""
    server_learning_rate: Positive = 1.0
    """Step of the global adapter along the combined update."""
    server_noise: Positive | None = None
    """Shorten the server's step where the noise that a round adds to each number would have a larger deviation than
    this (post-processing: free under DP). Empty: never."""
    server_refinement: bool = False
    """Bring the head closer to what the server's own texts, without their labels, look like, the more of it is noise
    (post-processing: free under DP). For a phase that trains the head alone, with ``server_optimizer = "sgd"``."""
    server_momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of the combined update at the server; β₁ of ``adam`` and ``yogi``."""
    server_second_moment: float = Field(default=0.99, ge=0, lt=1)
    """β₂ of ``adam`` and ``yogi``."""
    server_adaptivity: Positive = 1e-3
    """τ of ``adam`` and ``yogi``: added to the root of the second moment; smaller is more adaptive."""
    server_average: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential average of the global adapters; the average is what is evaluated and kept, while training
    goes on from the last one (post-processing: free under DP). 0 for none."""

    @model_validator(mode="after")
    def _consistent(self) -> PhaseSection:
        if (self.sample_rate is None) == (self.batch_size is None):
            raise ValueError("sample_rate: give exactly one of sample_rate and batch_size")
        if self.algorithm not in LOCAL_RULES:
            known = did_you_mean(self.algorithm, LOCAL_RULES)
            raise ValueError(f"algorithm = '{self.algorithm}': is unknown{known}")
        if not self.train or len(set(self.train)) != len(self.train):
            raise ValueError("train: must list 'head', 'lora' or both, each once")
        if self.server_refinement and (
            self.train != ("head",) or self.server_optimizer != "sgd" or self.server_average
        ):
            raise ValueError(
                "server_refinement: needs train = ['head'], server_optimizer = 'sgd' and no server_average; "
                "without them the noise in the head is not known"
            )
        return self


class WireSection(Section):
    """``[wire]``: the number formats in which adapters travel."""

    down: Literal["fp32", "bf16", "int8"] = "fp32"
    """Coordinator to sites. ``int8``: one scale a row, rounded to the nearest."""
    up: Literal["fp32", "bf16", "int8"] = "fp32"
    """Sites to coordinator. ``int8``: one scale a row, rounded at random, and what rounding took away is added to the
    site's next update (post-processing: free under DP)."""


class ServerSection(Section):
    """``[server]``: rounds, quorum and where the SuperLink is."""

    min_sites: Count = 1
    """Wait for so many described sites before round 1."""
    min_replies: Count = 1
    """Quorum: a round with fewer admitted replies fails the run (it can be resumed)."""
    cohort: Fraction = 1.0
    """Share of the sites asked in each round, drawn from the public seed."""
    round_timeout: Positive = 3600.0
    """Deadline of a round in seconds; later replies are rejected as late."""
    weights: Literal["uniform", "public-size"] = "public-size"
    """Weights of the sites in the average: equal, or by their declared public sizes. True counts never travel."""
    superlink: str = "127.0.0.1:8000"
    """host:port of the SuperLink (``consilium server run``)."""
    root_certificates: Path | None = None
    """PEM file of the authority that signed the SuperLink's certificate."""
    insecure: bool = False
    """Talk to the SuperLink without TLS. For tests on one machine."""
    signing_key: Path | None = None
    """The coordinator's private key (``consilium server keygen``); sites pin its public half, and take no plan that it
    has not signed. A simulation makes one of its own."""
    device: str = "auto"
    """Where the coordinator of a deployment evaluates: ``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda``
    or ``cuda:N``. A simulation's one model is where ``simulation.device`` says."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of that model. ``auto``: bfloat16 on a GPU that has it, else float32."""


class EvaluationSection(Section):
    """``[evaluation]``: the server's own held-out data. Not a site's."""

    path: str | None = None
    """A folder or file; empty in a simulation: the validation and test split of ``data.path``."""
    validation: str = "validation"
    """Split used before round 1 and after the rounds that ``every`` names, for best-round selection and early
    stopping."""
    every: Count = 1
    """With k: evaluate after every k-th round of a phase, and always after its last one. A round that is not evaluated
    has no metrics, and its adapter cannot be the one that is kept."""
    test: str | None = "test"
    """Split used once, at the end. Empty string or absent file: no test figures."""
    columns: dict[str, str] | None = None
    """As ``data.columns``; empty: the same."""
    metric: str = ""
    """Metric that selects the best round. Empty: the task's own."""
    selection: Literal["auto", "best", "one-standard-error"] = "auto"
    """Which round's adapter is kept. ``best``: the one with the best metric. ``one-standard-error``: the latest whose
    accuracy is at most one standard error below the best (Breiman et al. 1984), so that a lucky draw of the noise does
    not win against later rounds that have learnt more, and better than what its phase began with; only with
    ``metric = "accuracy"``. ``auto``: that one under DP where the metric allows it, else ``best``."""
    patience: Count | None = None
    """Stop a phase's remaining rounds after so many rounds without a better metric. Rounds that are not evaluated count
    too, but only an evaluated one can be the last. Spent ε is not refunded."""
    generate: int = Field(default=8, ge=0)
    """Causal LM: answer so many examples of a split in free text at each evaluation, for ROUGE-L; 0 for none."""
    limit: Count | None = None
    """Evaluate at most so many examples of each split (the first ones)."""


class SimulationSection(Section):
    """``[simulation]``: what the synthesised sites are like."""

    seed: int = Field(default=0, ge=0)
    """Keys of sampling and noise at the simulated sites; a deployment takes them from the operating system."""
    public_size: Literal["exact", "rounded"] = "exact"
    """Each site's declared size: its true row count, or that rounded down to two significant digits."""
    ranks: tuple[Count, ...] = ()
    """Largest LoRA rank that each site allows, dealt out in the order of the sites' names, again and again. Empty: the
    plan's. A rank below ``lora.r`` needs an algorithm that lets sites choose theirs (``flexlora``)."""
    physical_batch: Count | None = None
    """Rows of one forward and backward pass. Empty: 8, or 4 on a CPU with texts of more than 64 tokens. On a GPU more
    are faster, as far as its memory allows."""
    sites_per_pass: Count = 1
    """Sites that train in lock-step, so that rows of several of them fill each forward pass of the base model, each row
    with its own site's adapter. Every site gets the update that it would get alone, but for rounding; so the last bits
    depend on which sites were trained together."""
    device: str = "auto"
    """``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 autocast on a GPU that has it, else float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    workers: Count | None = None
    """In-process: sites trained at the same time, each on one thread of torch, with a replica of the model that shares
    the base's weights. The result does not depend on how many. Empty: one after the other, with all of torch's
    threads."""
    cache: Path | None = None
    """Folder in which the tokenised texts and frozen activations are kept for the next run: it then holds data. Empty:
    nothing of them outlives the run."""
    compare: bool = False
    """Also train each site alone at the same ε, and the federation without privacy, and show them side by side."""
    engine: Literal["in-process", "ray"] = "in-process"
    """Where the sites are worked on: in this process, or in actors of a Ray cluster (``pip install 'consilium[ray]'``).
    The result is the same."""
    ray_address: Annotated[str, Field(pattern=r"^(auto|[^\s/]+:\d{1,5})$")] | None = None
    """Ray: host:port of the cluster's head, as ``ray start --head`` prints it, or ``auto``: the one that runs on this
    machine. Empty: one of its own, on this machine, as long as the run lasts."""
    actors: Count | None = None
    """Ray: how many actors share the sites; each holds a base model of its own. Empty: as many as there is room for."""
    cpus_per_actor: Positive = 1.0
    """Ray: cores of each actor, and so threads of its arithmetic; a part of one is one thread."""
    gpus_per_actor: float = Field(default=0.0, ge=0)
    """Ray: GPUs of each actor; a fraction lets several actors share one."""

    @model_validator(mode="after")
    def _one_engine(self) -> SimulationSection:
        if self.engine == "ray" and (self.workers is not None or self.sites_per_pass > 1):
            raise ValueError("engine = 'ray': actors share the sites; leave out workers and sites_per_pass")
        return self
