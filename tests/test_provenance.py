"""What is written down about a run's origin, and what never is."""

import subprocess

from ropewalk import provenance


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
