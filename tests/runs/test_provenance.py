"""What is written down about a run's origin, and what never is."""

import secrets
import subprocess

import pytest

from ropewalk.runs import record as provenance

DRAWN = f"a1{secrets.token_hex(16)}"


def test_only_named_variables_are_recorded_and_no_secrets():
    environment = {
        "SLURM_JOB_ID": "1", "NCCL_DEBUG": "WARN", "SLURM_JWT": "x", "HF_TOKEN": "x", "WANDB_API_KEY": "x",
        "AWS_SECRET_ACCESS_KEY": "x", "NCCL_AUTH": "x", "PYTORCH_MY_PASSWORD": "x", "HOME": "x", "MY_NCCL_X": "x",
    }  # fmt: skip
    assert provenance.recorded_environment(environment) == {"NCCL_DEBUG": "WARN", "SLURM_JOB_ID": "1"}


def test_changes_apply_to_the_commit(tmp_path, monkeypatch):
    """The patch, applied to a clone of the commit, gives the tree."""
    tree, clone = tmp_path / "tree", tmp_path / "clone"

    def git(*words, at=tree, given=None):
        named = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(named, cwd=at, check=True, capture_output=True, text=True, input=given).stdout

    tree.mkdir()
    git("init", "--quiet")
    (tree / "a.py").write_text("one\ntwo\n")
    git("add", "a.py")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "TREE", tree)
    assert provenance.git_changes() == ""
    assert provenance.git_commit() == git("rev-parse", "HEAD").strip()
    git("clone", "--quiet", str(tree), str(clone), at=tmp_path)
    (tree / "a.py").write_text("one\n2 \n")
    (tree / "new.py").write_text("x\n")
    changes = provenance.git_changes()
    assert changes.endswith("# not in git: new.py\n")
    git("apply", at=clone, given=changes)
    assert (clone / "a.py").read_text() == "one\n2 \n"
    assert provenance.git_commit().endswith("+changes")


@pytest.mark.parametrize("line", [
    "+      WANDB_API_KEY: {}", "export HF_TOKEN={}", 'environment["AWS_SECRET_ACCESS_KEY"] = "{}"',
    "HF_TOKEN_2={} srun x", "AWS_ACCESS_KEY_ID: {}", "TOKEN: {}", "SECRET: {}",
    '"KEY": "{}"', "API_KEYS: {}", "COOKIES: {}", "MYSQL_PASSW: {}",
    "AUTHORIZATION: {}", "wandb_api_key: {}", "hf_token={}", "api-key: {}", 'wandb.login(key="{}")', "GITHUB_PAT={}",
    'environment.setdefault("HF_TOKEN", "{}")', "Authorization: Bearer {}", "git clone https://hf_{}@host/x",
    "x = 'sk-{}'",
])  # fmt: skip
def test_what_is_written_like_a_key_is_masked(line):
    text = f"first\n{line.format(DRAWN)}\nlast\n"
    masked = provenance.masked(text)
    assert DRAWN not in masked
    assert "***" in masked
    assert masked.splitlines()[0::2] == ["first", "last"]


def test_a_short_value_of_an_environments_name_is_masked():
    assert provenance.masked("export MY_PASSWORD=abc\n") == "export MY_PASSWORD=***\n"


@pytest.mark.parametrize("text", [
    "PREFERRED_TOKENS = 65_536\n", "tokens: int = 4096\n", "token: str\n", "key = sha256_text(content_2)\n",
    "export HF_TOKEN=\nsrun python train.py\n", "      HF_TOKEN:\n    scratch: /tmp/a1\n",
    '[ -n "${WANDB_API_KEY:?}" ] || exit 2\n', "export HF_TOKEN=$MY_TOKEN\n", "max_new_tokens=12\n",
    "for key, value in x:\n",
    "KEY = re.compile('a1')\n", "import METADATA_KEY, Position1\n", "tokenizer: meta-llama/Llama-3-8B\n",
    "author = someone1234\n",
])  # fmt: skip
def test_what_is_no_key_stays(text):
    assert provenance.masked(text) == text


def test_known_secrets_are_the_environments_long_ones():
    environment = {"HF_TOKEN": "abcdefgh", "API_KEY": "short", "HOME": "/root/of/all"}
    assert provenance.secrets_in(environment) == {"abcdefgh"}
