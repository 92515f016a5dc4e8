"""Secrets in URLs, in the environment and in what libraries say stand in nothing that is printed or kept."""

import json
import subprocess
import sys
import time

import pytest

from fft.corpus.accounts import lineage_of
from fft.data.commits import begin_writing, commit
from fft.data.manifest import WRITING_NAME, Manifest
from fft.data.storage import Storage
from fft.errors import UserError, one_line, run_cli
from fft.redaction import has_credentials, is_secret_name, redact, redact_all
from fft.serve.outputs import Partial
from spark_jobs.token_table.picture import _facts

#: As they come: slashes and plus signs are of AWS's alphabet.
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCY"
WITH_SECRETS = {
    f"s3://AKIA:{SECRET}@bucket/a": "s3://***@bucket/a",
    f"s3:/AKIA:{SECRET}@bucket/a": "s3:/***@bucket/a",
    "s3://k:1/2@bucket and s3a://bucket/table@v3": "s3://***@bucket and s3a://bucket/table@v3",
    "https://me:p@ss@host:80/x": "https://***@host:80/x",
    f"abfs://box:{SECRET}@host/x": "abfs://***@host/x",
    "https://h/a?X-Amz-Signature=0f1e&part=2&max_tokens=7": "https://h/a?X-Amz-Signature=***&part=2&max_tokens=7",
    "abfss://b@h/x?sv=1&sig=aGVsbG8%3D": "abfss://b@h/x?sv=1&sig=***",
    "Authorization: Bearer abc.def": "Authorization: Bearer ***",
    'fs.s3a.secret.key=abcd, {"password": "xyzxyz"}': 'fs.s3a.secret.key=***, {"password": "***"}',
}
HARMLESS = [
    "hdfs://namenode:8020/lake/table@v3",
    "hdfs://namenode:8020",
    "abfs://container@account.dfs.core.windows.net/x",
    "file:///a:b/c@v3",
    "http://[::1]:80/a@b",
    "--api_key: give one",
    "s3://lake/keys=1/token=2/x.parquet",
    "pad_token=<pad>",
]


@pytest.mark.parametrize(("text", "safe"), WITH_SECRETS.items())
def test_what_is_secret_becomes_stars(text, safe):
    assert redact(text) == safe
    assert redact(safe) == safe


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_not_stays(text):
    assert redact(text) == text
    assert not has_credentials(text)


def test_names_of_secrets():
    secret = "HF_TOKEN WANDB_API_KEY PGPASSWORD AWS_SECRET_ACCESS_KEY AZURE_STORAGE_CONNECTION_STRING DB_PASS"
    others = "TOKENIZERS_PARALLELISM SSH_AUTH_SOCK MAX_TOKENS KEYBOARD AZURE_TOKEN_FILE MONKEY_HOME"
    assert [name for name in f"{secret} {others}".split() if is_secret_name(name)] == secret.split()


def test_values_of_the_environment_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "hf_abcdEFGH1234")
    monkeypatch.setenv("PASSWORD", "short")
    monkeypatch.setenv("SOME_KEY", "/home/me/key.pem")
    assert (
        redact("denied: hf_abcdEFGH1234 for short, see /home/me/key.pem")
        == "denied: *** for short, see /home/me/key.pem"
    )
    assert redact_all({"a": ["xhf_abcdEFGH1234", 1, None]}) == {"a": ["x***", 1, None]}
    assert one_line(ValueError("no hf_abcdEFGH1234")) == "no ***"


@pytest.mark.parametrize(
    "text", ["s3://", "a:/b:", "s3://a:", "secret", "?a=", "a.", "a+", "bearer ", "password='", "x://a:b"]
)
def test_no_text_takes_long(text):
    begun = time.process_time()
    redact(text * (200_000 // len(text)))
    assert time.process_time() - begun < 10  # a quadratic one takes minutes


@pytest.mark.parametrize("url", [f"s3://AKIA:{SECRET}@bucket/a", "abfs://box@host/x?sig=aGVsbG8"])
def test_places_with_credentials_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="has credentials in it") as refused:
        Storage.at(url)
    assert SECRET not in str(refused.value)
    assert "aGVsbG8" not in str(refused.value)


@pytest.mark.parametrize(
    "command",
    [
        "fft.train --train_data {url} --model x",
        "fft.train --dry_run --config {config}",
        "fft.checkpoint.convert {url} out",
        "fft.serve.batch_infer --model=m --prompt_file={url} --output_file o",
        "spark_jobs.tokenize -i {url} -o out --tokenizer t",
    ],
)
def test_commands_refuse_them_too(command, tmp_path):
    url = f"s3://AKIA:{SECRET}@bucket/a"
    config = tmp_path / "config.yaml"
    config.write_text(f"train_data: {url}\nmodel: x\n")
    words = command.format(url=url, config=config).split()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: s3://***@bucket/a has credentials in it")
    assert SECRET not in done.stdout + done.stderr


def test_a_programs_fault_does_not_tell_them_either(monkeypatch, capsys):
    monkeypatch.setenv("HUB_TOKEN", "hf_abcdEFGH1234")

    def main():
        raise RuntimeError("403 for hf_abcdEFGH1234")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    told = capsys.readouterr().err
    assert ended.value.code == 1
    assert "RuntimeError: 403 for ***" in told
    assert "hf_abcdEFGH1234" not in told


def test_manifests_and_marks_do_not_keep_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_TOKEN", "hf_abcdEFGH1234")
    origin = {"input": "https://h/a?token=abcd", "of": "hf_abcdEFGH1234"}
    lineage = lineage_of("tokenize", [origin], {"text_key": "hf_abcdEFGH1234"})
    begin_writing(tmp_path, lineage)
    mark = (tmp_path / WRITING_NAME).read_text()
    commit(tmp_path, Manifest((), 0, 0, lineage=lineage))
    (manifest,) = tmp_path.iterdir()
    counts, timing = {"documents_out": 0}, {"tokens_per_second": 0}
    told = Manifest((), 0, 0, lineage={**lineage, "counts": counts, "timing": timing})
    page = json.dumps(_facts(told), default=str) + told._repr_html_()
    Partial(tmp_path / "answers.jsonl", {"reading": {"system": "say hf_abcdEFGH1234"}}, resume=False).close()
    assert Partial(tmp_path / "answers.jsonl", {"reading": {"system": "say hf_abcdEFGH1234"}}, resume=True).done == 0
    header = (tmp_path / ".answers.jsonl.partial.json").read_text()
    for kept in (mark, manifest.read_text(), page, header):
        assert "hf_abcd" not in kept
        assert "abcd" not in json.dumps(kept)
