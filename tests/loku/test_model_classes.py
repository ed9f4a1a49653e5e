"""Each class of the table in docs/models.md does what the table says."""

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path

import model_classes
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

ROOT = Path(__file__).parents[2]
RESULTS = {
    facts["kind"]: facts
    for facts in json.loads((ROOT / "scripts" / "model_table.json").read_text(encoding="utf-8"))
}

pytestmark = pytest.mark.usefixtures("one_thread", "seeded")


@pytest.mark.parametrize("kind", model_classes.KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_class_is_unlearned_right_or_refused(kind, tmp_path):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {version('transformers')} has no {kind}")
    shown = model_classes.run(kind, tmp_path)
    assert not shown.wrong()
    assert shown.facts() == RESULTS[kind], "run: python scripts/model_table.py --run"


def test_the_page_has_the_results():
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "scripts" / "model_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert sorted(RESULTS) == sorted(model_classes.KINDS)
    assert page == script.render(page, list(RESULTS.values())), "run: python scripts/model_table.py"
