"""A model's revision changes with everything that changes an embedding, and with nothing else."""

from __future__ import annotations

import pytest

from scalemerge.checkpoints.revision import model_revision
from scalemerge.errors import InputError
from scalemerge.evaluation.definitions import mteb_name


def test_one_byte_of_weights_changes_the_revision(make_model_folder):
    first, second = make_model_folder("a", b"\0" * 999 + b"\1"), make_model_folder("b", b"\0" * 999 + b"\2")
    assert model_revision(first) != model_revision(second)
    assert len(model_revision(first)) == 40


@pytest.mark.parametrize("file", ["1_Pooling/config.json", "config_sentence_transformers.json", "tokenizer.json"])
def test_small_files_change_the_revision(make_model_folder, file):
    folder = make_model_folder("a")
    before = model_revision(folder)
    (folder / file).write_text('{"changed": true}')
    assert model_revision(folder) != before


def test_cards_logs_and_inner_checkpoints_do_not(make_model_folder):
    folder = make_model_folder("a")
    before = model_revision(folder)
    (folder / "README.md").write_text("another card")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5/model.safetensors").write_bytes(b"x")
    assert model_revision(folder) == before == model_revision(folder.rename(folder.with_name("b")))


def test_a_folder_without_weights_is_no_model(make_model_folder, tmp_path):
    folder = make_model_folder("a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        model_revision(folder)
    with pytest.raises(InputError, match="no such model folder"):
        model_revision(tmp_path / "absent")


def test_names_become_organization_and_model():
    assert mteb_name("merge:slerp v2") == "scalemerge/merge-slerp-v2"
    assert mteb_name("../x/") == "scalemerge/x"
    assert mteb_name(":") == "scalemerge/model"
