"""What a config needs on this host: that it makes a plan, and that model, data, stores and disks are there."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from seqaware.compat.operator_status import extensions_folder, operator_states
from seqaware.config.schema import Config, DatasetConfig
from seqaware.data.resolve_source import locate
from seqaware.data.store.store_index import find_store, sources_of, store_folder
from seqaware.data.store.token_store import TokenStore
from seqaware.doctor.environment import is_on
from seqaware.doctor.findings import Finding, error, ok, warning
from seqaware.doctor.shared_disk import nearest_existing, roughly_writes, why_not_writable
from seqaware.estimate.known_models import known_facts
from seqaware.estimate.layout import layout_of
from seqaware.models.model_source import check_model_source
from seqaware.plan.offload import swap_folders
from seqaware.plan.plan import Plan, make_plan
from seqaware.plan.specs import World, model_facts
from seqaware.training.run_directory import RunDirectory, check_disk, check_writable, is_finished

_HUB_SECONDS = 5.0
_CACHE_BYTES = 10 * 10**9
_SLOW_MEGABYTES = 20


@dataclass(frozen=True)
class Hub:
    """How this host comes to models and data of the hub.

    Attributes:
        offline: HF_HUB_OFFLINE is set. endpoint: its address. cache: where what was fetched lies.
    """

    offline: bool
    endpoint: str
    cache: Path

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Hub:
        home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        cache = Path(env.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()
        offline = is_on(env.get("HF_HUB_OFFLINE")) or is_on(env.get("TRANSFORMERS_OFFLINE"))
        return cls(offline, env.get("HF_ENDPOINT") or "https://huggingface.co", cache)

    def why_unreachable(self) -> str | None:
        """None if the hub answers, else why not. Takes proxies into account, as the libraries do."""
        try:
            with urllib.request.urlopen(self.endpoint, timeout=_HUB_SECONDS):
                return None
        except urllib.error.HTTPError:
            return None  # it answers, if only to say no
        except (OSError, ValueError) as trouble:
            return str(getattr(trouble, "reason", trouble))


def plan_of(config: Config, *, world: World, deepspeed_path: Path | None) -> Plan:
    """The plan as far as it can be made without reading data.

    Raises:
        ConfigError: the config contradicts itself, the ranks or the model.
    """
    facts = model_facts(config.model) or known_facts(config.model.base_name)
    return make_plan(config, world=world, deepspeed_path=deepspeed_path, model=facts)


def planned(plan: Plan) -> Iterator[Finding]:
    """What the plan comes to, in a line."""
    world, batches = plan.world, plan.batches
    size = f"{batches.global_batch_size} sequences" if batches.global_batch_size else "tokens"
    size = f"{batches.global_batch_tokens:,} tokens" if batches.global_batch_tokens else size
    ranks = f"{world.size} rank{'s' * (world.size != 1)} on {world.device}"
    yield ok("plan", f"{ranks}, ZeRO {plan.zero_stage}, {plan.dtype}, steps of {size}")


def model(config: Config, hub: Hub) -> Iterator[Finding]:
    """Whether the model and its tokenizer are here, or can be fetched."""
    written = config.model
    check_model_source(written)
    for subject, name in (("model", written.base_name), ("tokenizer", written.tokenizer)):
        if name is None:
            continue
        folder = Path(name).expanduser()
        if folder.is_dir():
            if subject == "model" and not written.trust_remote_code:
                # Here, because transformers takes seconds to import.
                from seqaware.models.model import check_model_folder

                check_model_folder(folder, allow_missing=written.allow_missing)
            yield ok(subject, str(folder))
        else:
            yield from _of_hub(subject, name, "model", hub)
    if written.trust_remote_code:
        do = "write false unless you have read that code"
        yield warning("model", "model.trust_remote_code: code that comes with the model is run", do)


def data(config: Config, hub: Hub, *, command: str) -> Iterator[Finding]:
    """Whether the rows are here or tokenised already.

    Args:
        command: that tokenises them.
    """
    for section, dataset in (("dataset", config.dataset), ("evaluation", config.evaluation.dataset)):
        if dataset is not None:
            yield from _dataset(section, config, dataset, hub=hub, command=command)


def _dataset(section: str, config: Config, dataset: DatasetConfig, *, hub: Hub, command: str) -> Iterator[Finding]:
    store = find_store(config, dataset)
    if store is not None:
        facts = TokenStore.open(store).facts()
        yield ok(section, f"tokenised: {facts.documents:,} documents, {facts.tokens:,} tokens in {store}")
        return
    for source in sources_of(dataset):
        located = locate(source)
        if located.kind == "hub":
            yield from _of_hub(section, located.hub.repository, "dataset", hub)
        else:
            files = located.local_files()
            size = sum(file.stat().st_size for file in files)
            yield ok(section, f"{source.name}: {len(files)} file{'s' * (len(files) != 1)}, {size / 1e6:,.1f} MB")
    yield warning(section, "not tokenised yet: the first start does that", f"{command}, so that no rank waits for it")
    folder = store_folder(dataset)
    reason = why_not_writable(folder)
    if reason is not None:
        yield error("stores", f"{folder} cannot be written: {reason}", "set dataset.store_dir elsewhere")
    else:
        yield ok("stores", f"{folder}: {_free(folder)}")


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(nearest_existing(folder)).free / 1e9:,.1f} GB free"


def _of_hub(subject: str, name: str, kind: str, hub: Hub) -> Iterator[Finding]:
    folder = hub.cache / f"{kind}s--{name.replace('/', '--')}"
    if (folder / "snapshots").is_dir():
        yield ok(subject, f"{name}: in the hub's cache on this host")
        return
    missing = f"{name} is not in the hub's cache on this host"
    if hub.offline:
        do = f"unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download {name}"
        yield error(subject, f"{missing}, and HF_HUB_OFFLINE is set", do)
        return
    reason = hub.why_unreachable()
    if reason is None:
        yield ok(subject, f"{name}: to be fetched from the hub, which answers")
    else:
        do = f"fetch it on a host with a network, into a shared HF_HOME: hf download {name}"
        yield error(subject, f"{missing}, and the hub does not answer: {reason}", do)


def cache(hub: Hub) -> Iterator[Finding]:
    """Room in the hub's cache, and whether its disk is one to read models from."""
    elsewhere = "export HF_HOME=<a folder on another disk>"
    existing = nearest_existing(hub.cache)
    try:
        speed = roughly_writes(existing)
    except OSError as trouble:
        yield warning("hub cache", f"{hub.cache} cannot be written: {trouble.strerror}", elsewhere)
        return
    found = f"{hub.cache}: {_free(hub.cache)}"
    if shutil.disk_usage(existing).free < _CACHE_BYTES:
        yield warning("hub cache", found, f"free some, or {elsewhere}")
    elif speed < _SLOW_MEGABYTES:
        yield warning("hub cache", f"{found}, but it writes {speed:.0f} MB/s", elsewhere)
    else:
        yield ok("hub cache", found)


def run_folder(plan: Plan) -> Iterator[Finding]:
    """What lies in the run's folder, and whether its results fit on the disk.

    Raises:
        ConfigError: they do not fit; or the folder cannot be written.
    """
    folder = RunDirectory(Path(plan.config.output_dir))
    check_writable(folder.path)
    if folder.manifest.is_file():
        finished = plan.total_steps is not None and is_finished(folder, plan)
        then = "it is finished, and the same command leaves it so" if finished else "the same command goes on with it"
        yield ok("run", f"{folder.path} holds a run; {then}")
    layout = layout_of(plan)
    if layout is None:
        yield ok("disk", "what the run needs is not known before the model's config is here")
        return
    check_disk(folder.path, plan, layout.decoder.parameters, trained=layout.trained)
    parameters = layout.decoder.parameters
    yield ok("disk", f"room for a model of {parameters / 1e6:,.1f} M weights and its checkpoints")


def drives(plan: Plan) -> list[Path]:
    """Folders on drives that take offloaded states."""
    return sorted({folder.parent for folder in swap_folders(plan.deepspeed["zero_optimization"])})


def operators(plan: Plan, env: Mapping[str, str]) -> Iterator[Finding]:
    """DeepSpeed's compiled operators that the config needs."""
    folder = extensions_folder(env.get("TORCH_EXTENSIONS_DIR"))
    for state in operator_states(plan, folder=folder):
        subject = f"operator {state.name}"
        if state.built:
            yield ok(subject, f"built, in {folder}")
        elif state.can_be_built and why_not_writable(folder) is not None:
            found = f"to be built in {folder}, which cannot be written: {why_not_writable(folder)}"
            yield error(subject, found, "export TORCH_EXTENSIONS_DIR=<a folder that can be written>")
        elif state.can_be_built:
            yield ok(subject, f"will be built at the first start, in a minute or two ({state.asked_by})")
        else:
            do = "see compiler, ninja and libaio above; or choose what needs no operator"
            yield error(subject, f"cannot be built on this host ({state.asked_by})", do)
