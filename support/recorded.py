"""Numbers to set beside a run's own: what SFT came to with the same settings, from
analysis/recorded.json, which `python analysis/study.py --record` wrote from finished runs.
"""

import dataclasses
import statistics
from pathlib import Path

from support.files import read_json
from support.options import TINY, Config

FILE = Path(__file__).resolve().parent.parent / "analysis" / "recorded.json"
# What neither SFT learns from nor its test questions depend on: Pearl's and the rival's settings,
# names and places, and what only costs time or memory.
IGNORED = {
    "method", "recipe", "seed", "out", "device", "outside_images", "packed", "workers", "shard",
    "gradient_checkpointing", "feature_cache", "feature_cache_gb", "log_every", "save_every",
    "track", "call_limit", "lambda_latent", "pred_tokens", "pred_position", "predictor_weights",
    "distance", "jepa", "target_encoder", "target_view", "targets", "horizon", "latents",
    "decode_latents", "ema", "ema_rises", "target_layer", "target_position", "pred_head",
    "infonce_masked", "vicreg", "vicreg_terms", "sigreg",
    *(field.name for field in dataclasses.fields(Config) if field.name.startswith("nextlat_")),
}


def settings_of(config: dict) -> dict:
    """Of a run's config (as a dict) what two runs must share to be set beside one another. The
    shipped model is named without its place, which differs from one copy to the next."""
    shared = {name: value for name, value in config.items() if name not in IGNORED}
    if Path(shared["model"]).resolve() == Path(TINY):
        shared["model"] = Path(TINY).name
    return shared


def recorded(config: Config, method: str = "sft") -> dict | None:
    """What `method` came to with this config's settings, whatever its own method and seed; None
    where nothing was recorded. Keys: method, seeds, command, commit, table and before; a table has
    for each family n, chance, and of each way to answer one accuracy in % a seed."""
    if not FILE.is_file():
        return None
    # a field that is younger than the record had its default then
    defaults = settings_of(dataclasses.asdict(Config()))
    wanted = settings_of(dataclasses.asdict(config))
    for record in read_json(FILE)["records"]:
        then = {name: record["settings"].get(name, defaults[name]) for name in wanted}
        if record["method"] == method and then == wanted:
            return record
    return None


def as_text(record: dict) -> str:
    """A record in two lines: means over its seeds by family, and where the numbers come from."""
    rows = []
    for family, row in record["table"].items():
        ways = [f"{way} {statistics.mean(row[way]):.1f}" for way in ("direct", "free", "tool")
                if way in row]
        rows.append(f"{family} {', '.join(ways)}")
    seeds = ", ".join(map(str, record["seeds"]))
    return (f"{record['method']} with the same settings, mean of seeds {seeds}: {'; '.join(rows)}\n"
            f"({FILE.parent.name}/{FILE.name}: {record['command']}, commit "
            f"{record['commit'][:10]})")
