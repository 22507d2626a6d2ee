"""lm-evaluation-harness on a model of ours, with a task whose data lies beside it."""

import importlib.util
import json

import pytest

import seqmix
from seqmix.cli import main
from seqmix.core.errors import DataError
from seqmix.measure.harness import harness

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="pip install 'seqmix[harness]'"
)
TASK = """
task: sheep
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_target: answer
doc_to_choice: "{{{{endings}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learnt that sheep follow goats, and questions on it."""
    folder = tmp_path_factory.mktemp("harness")
    text = folder / "text.txt"
    text.write_text("goats sheep goats sheep goats sheep\n" * 300)
    seqmix.train(
        "attention", text, steps=40, length=64, batch=4, out=folder / "model", progress=False
    )
    rows = [{"context": "goats", "endings": [" sheep", " xqzzw"], "answer": 0}] * 3
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sheep.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_local_task_is_scored(folder, capsys):
    command = ["eval", str(folder / "model"), "--harness", "sheep", "--limit", "2", "--json"]
    assert main([*command, "--include", str(folder / "tasks")]) == 0
    assert json.loads(capsys.readouterr().out)["sheep"]["acc"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_refused(folder):
    model, tokenizer = seqmix.load(folder / "model")
    with pytest.raises(DataError, match=r"'sheeep'. Did you mean .*sheep"):
        harness(model, tokenizer, ["sheeep"], include=folder / "tasks")


def test_data_or_tasks_are_asked_for(capsys):
    assert main(["eval", "somewhere"]) == 2
    assert "either --data or --harness" in capsys.readouterr().err
