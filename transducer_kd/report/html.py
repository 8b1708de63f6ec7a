"""report.html: one page with tables and figures and nothing to load from anywhere."""

from pathlib import Path
from typing import Any, Dict, List

import jinja2

from transducer_kd.report import device, plots, summaries, systems, tables, targets

_TEMPLATE = Path(__file__).with_name("template.html")


def render(report: Dict[str, Any], made: str) -> str:
    """The whole page. made: when and by which command, shown at its end."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        report=report,
        made=made,
        warning=tables.SYNTHETIC_WARNING,
        cards=_cards(report),
        notes=tables.notes(report),
        side_by_side=systems.side_by_side_rows(report) if len(report["phases"]) > 1 else [],
        side_by_side_notes=systems.side_by_side_notes(report),
        comparisons=systems.comparison_tables(report, is_short=True),
        all_comparisons=systems.comparison_tables(report),
        comparison_notes=systems.comparison_notes(report),
        summaries=summaries.summaries(report),
        device=device.device_tables(report),
        labels=targets.label_rows(report),
        labels_note=targets.LABELS_NOTE,
        results=tables.results_rows(report),
        details=tables.detail_rows(report),
        training=tables.training_rows(report),
        training_note=tables.TRAINING_NOTE,
        pretraining=tables.pretraining_rows(report),
        pretraining_note=tables.PRETRAINING_NOTE,
        stages=tables.stage_rows(report),
        stage_total=tables.stage_total(report),
        corpus=tables.corpus_rows(report),
        provenance=tables.provenance_rows(report),
        figures=plots.figures(report),
    )
    return page.lstrip()  # the macro before the doctype leaves a line


def _cards(report: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The few numbers that a reader wants first: one card per system with its best method's WERs."""
    cards = []
    for system in systems.key_systems(report):
        by_set, phase = system["headline"], system["phase"]
        some = next(iter(by_set.values()))
        rates = [(name, f"{r['wer']:.2f}") for name, r in by_set.items()]
        size, saved = tables.millions(some["params_deployed"]), systems.saved(phase, report)
        size += "" if saved is None else f" ({systems.percent(saved)} smaller than the teacher)"
        role = phase["what"] if phase["control_of"] else phase["role"]
        about = [role, size, some["method"], some["mode"]]
        cards.append({"label": phase["name"], "rates": rates, "about": ", ".join(filter(None, about))})
    return cards
