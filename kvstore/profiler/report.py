"""The report of a run: one HTML file that opens from disk, without scripts and without anything from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape

from kvstore.profile import Profile
from kvstore.profiler import plots
from kvstore.profiler.run import Finished

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c2530 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25rem .6rem; text-align: right }
th { border-bottom: 2px solid #8a94a0; font-weight: 600 } td { border-bottom: 1px solid #dde2e8 }
td.text, th.text { text-align: left } tr.first td { border-top: 2px solid #b0b8c4 }
svg { max-width: 100%; height: auto } .wide { overflow-x: auto } code { font-size: 12px }
@media (prefers-color-scheme: dark) { body { background: #fff } }
"""


def html_report(finished: Finished) -> str:
    """The page."""
    measured, details = finished.profiles.measured, finished.profiles.details
    reference = details["reference"]
    where = [
        ("model", measured.model),
        ("revision", measured.revision[:16]),
        ("text", ", ".join(measured.texts)),
        ("device", f"{measured.device}, {measured.machine}"),
        ("date", measured.date),
        ("kvstore", measured.kvstore),
        ("seed", str(measured.seed)),
        ("candidates tried without the model", str(details["tried"])),
        ("configurations measured with it", str(details["measured"])),
        ("not feasible here", str(details["infeasible"])),
        (
            "hypervolume",
            f"{details['hypervolume']:.3f} beyond ratio {reference['ratio']:g}, "
            f"{reference['decode_s_per_gb']:.3g} s/GB, {reference['kl_nats']:g} nats",
        ),
    ]
    body = [
        f"<h1>Compression profiles of {escape(measured.model)}</h1>",
        _table(("", ""), [[escape(name), escape(value)] for name, value in where], texts=2),
        "<p>A profile is a pipeline whose one encoded copy holds several quality levels; a reader takes as many as its "
        "link and its quality budget call for. Quality loss is the KL divergence of the next-token distributions over "
        f"the {details['continuation_tokens']} tokens behind a compressed prefix, in nats, on text that had no part in "
        "calibration or search.</p>",
        "<h2>The front</h2>",
        plots.pairs(finished),
        plots.space(finished),
        "<h2>The search</h2>",
        plots.growth(finished.found),
        "<h2>Profiles</h2>",
        _profiles(finished),
        "<h2>Quality by prompt length</h2>",
        _buckets(finished.profiles.profiles),
        "<h2>Pipelines</h2>",
        *(
            f"<p><b>{escape(one.name)}</b> <code>{escape(_stages(one))}</code></p>"
            for one in finished.profiles.profiles
        ),
        _infeasible(finished),
    ]
    title = f"kvstore profiles of {escape(measured.model)}"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _profiles(finished: Finished) -> str:
    rows = []
    for configuration, profile in zip(finished.configurations, finished.profiles.profiles, strict=True):
        for number, level in enumerate(profile.levels):
            losses = [quality.kl_nats for quality in level.quality.values()]
            first = number == 0
            rows.append(
                [
                    escape(profile.name) if first else "",
                    escape(configuration.label) if first else "",
                    str(number),
                    f"{level.ratio:.2f}",
                    f"{profile.encode_s_per_gb:.2f}" if first else "",
                    f"{level.decode_s_per_gb:.2f}",
                    f"{sum(losses) / len(losses):.5f}",
                    f"{max(losses):.5f}",
                ]
            )
    head = ("profile", "strategy", "level", "ratio", "encode s/GB", "decode s/GB", "loss, mean", "loss, worst bucket")
    return _table(head, rows, texts=2)


def _buckets(profiles: Sequence[Profile]) -> str:
    names = list(profiles[0].levels[0].quality)
    rows = []
    for profile in profiles:
        for number, level in enumerate(profile.levels):
            cells = []
            for name in names:
                one = level.quality[name]
                cells += [f"{one.kl_nats:.5f} ± {one.standard_error:.5f}", f"{100 * one.agreement:.1f} %"]
            rows.append([escape(profile.name) if number == 0 else "", str(number), *cells])
    head = ["profile", "level"]
    for name in names:
        head += [f"{name}: loss", "same token"]
    return _table(head, rows, texts=1)


def _infeasible(finished: Finished) -> str:
    reasons = finished.found.infeasible
    if not reasons:
        return ""
    rows = [[escape(configuration.label), escape(reason)] for configuration, reason in reasons.items()]
    return "<h2>Not feasible here</h2>" + _table(("strategy", "why"), rows, texts=2)


def _stages(profile: Profile) -> str:
    return " | ".join(
        " ".join(
            str(value)[:16] if name in ("stage", "artefact") else f"{name}={value}" for name, value in stage.items()
        )
        for stage in profile.pipeline
    )


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], *, texts: int) -> str:
    """A table whose first columns are text; cells are HTML already. A row with a first cell begins a group."""

    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(
            f"<{tag}{' class=text' if number < texts else ''}>{value}</{tag}>" for number, value in enumerate(values)
        )

    titles = [escape(title) for title in head]
    top = f"<tr>{cells('th', titles)}</tr>" if any(titles) else ""
    body = "".join(f"<tr{' class=first' if row[0] else ''}>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'
