"""--overwrite replaces models, runs and tables, and nothing that a user keeps in, or mistook for, their folders."""

import pytest
from unit.checkpoint.test_folder import make
from unit.spark_jobs.test_output import write

from fft.arguments import parse_arguments
from fft.checkpoint.convert import main as convert
from fft.data.replaceable import MODEL, check_replaceable
from fft.data.storage import Storage
from fft.errors import UserError
from fft.planning.outputs import check_kept
from fft.text.convert_tokenizer import main as convert_tokenizer
from spark_jobs.token_table.output import Output
from spark_jobs.token_table.remains import remove_table

#: What people keep beside models.
KEPT = ("holiday.jpg", "thesis.tex", "train.py", "data.json", "photos/1.jpg", "model/config.json", "training/notes")


@pytest.fixture(params=KEPT)
def album(request, tmp_path):
    """A folder like a model's, with one more thing; it has to be as it was when a test ends."""
    place = tmp_path / "album"
    for name in ("config.json", "README.md", "model-00001-of-00002.safetensors", request.param):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    yield str(place), request.param
    assert len([path for path in place.rglob("*") if path.is_file() and path.read_text()]) == 4


def test_a_folder_with_more_than_a_model_stays(album, tmp_path):
    place, kept = album
    found = kept.split("/")[0]
    said = rf"album holds {found}, which is no part of a model and would be lost: move it, or choose another folder"
    args = parse_arguments(["--train_data", "t", "--model", "m", "--output_dir", place, "--overwrite"])
    with pytest.raises(UserError, match=f"--output_dir .*{said}"):
        check_kept("--output_dir", place, args)
    with pytest.raises(UserError, match=said):
        convert([str(tmp_path / "model"), place, "--overwrite"])
    with pytest.raises(UserError, match=said):
        convert_tokenizer([str(tmp_path / "model"), place, "--overwrite"])


def test_models_are_replaced(tmp_path):
    """As they are published, fetched and trained; and with files of the model that is trained on."""
    names = (
        *(
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ),
        *("model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json"),
        *("tokenizer.model", "sentencepiece.bpe.model", "qwen.tiktoken", "chat_template.jinja", "tekken.json"),
        *("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json"),
        *(
            "video_preprocessor_config.json",
            "modeling_qwen.py",
            "configuration_internvl_chat.py",
            "LICENSE",
            "README.md",
        ),
        *("additional_chat_templates/tool_use.jinja", ".cache/huggingface/download/config.json.metadata"),
        *(".gitattributes", "tokenization_qwen.py", "image_processing_x.py", "configuration.json", "LICENSE.txt"),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    check_replaceable("OUT", str(tmp_path), MODEL)
    (tmp_path / "conversation.py").touch()
    check_replaceable("OUT", str(tmp_path), MODEL, ["conversation.py"])
    with pytest.raises(UserError, match=r"OUT holds conversation\.py"):
        check_replaceable("OUT", str(tmp_path), MODEL)


@pytest.mark.parametrize("kept", ["step-1/photo.jpg", "step-1/training/notes.txt", "step-1/eval", "tensorboard/a"])
def test_a_run_that_begins_again_keeps_what_is_no_run_s(tmp_path, kept):
    make(tmp_path, 1)
    for name in ("tensorboard/events.out.tfevents.1", "tokens/x/part-00000.parquet", "notes/mine", "plot.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    args = parse_arguments(["--train_data", "t", "--model", "m", "--checkpoint", str(tmp_path), "--overwrite"])
    check_kept("--checkpoint", str(tmp_path), args)  # what it does not remove does not matter
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / kept).touch()
    with pytest.raises(UserError, match=f"--checkpoint .* holds {kept}, which is no part of a run and would be lost"):
        check_kept("--checkpoint", str(tmp_path), args)


@pytest.mark.parametrize("kept", ["x.parquet/photo.jpg", "x.parquet/a", "_quarantine/notes.txt", "train/thesis.tex"])
def test_a_folder_named_like_parquet_is_a_table_s_if_it_holds_nothing_else(tmp_path, kept):
    out = tmp_path / "out"
    (out / "x.parquet").mkdir(parents=True)
    for name in ("part-0.parquet", "_SUCCESS", ".part-0.parquet.crc"):
        (out / "x.parquet" / name).touch()
    job = Output(out, [""], [], True, "parquet")
    job.check()
    (out / kept).parent.mkdir(parents=True, exist_ok=True)
    (out / kept).touch()
    with pytest.raises(UserError, match=f"{kept}, which is no part of a table: give another folder"):
        job.check()
    remove_table(Storage.at(out))  # as a job does that has looked before somebody put this there
    assert (out / kept).is_file()
    (out / kept).unlink()
    with job.claim({}) as writers:
        write(writers[""], 1)
    assert not (out / "x.parquet").exists()
