"""``loku record``."""

import hashlib
import subprocess
import sys

import pytest
from deletion_facts import facts

from loku import cli
from loku.deletion.ledger import LEDGER, append
from loku.deletion.record import write_record
from loku.deletion.seal import SUMS, seal

pytest.importorskip("cryptography")


@pytest.fixture()
def key(tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "key.pem").write_bytes(private)
    public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "trusted_key.pem").write_bytes(public)
    return tmp_path / "key.pem", tmp_path / "trusted_key.pem"


@pytest.fixture()
def record(tmp_path):
    folder = tmp_path / "ledger" / "record"
    folder.mkdir(parents=True)
    write_record(folder, facts(measures=None, training=None, attacks=None))
    seal(folder)
    return folder


def verify(capsys, *arguments):
    code = cli.main(["record", "verify", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_a_good_record(record, key, capsys):
    code, printed, errors = verify(capsys, record)
    assert (code, errors) == (0, "") and printed.endswith(f"{record}: verified\n")
    assert f"3 files were hashed and compared with {SUMS}" in printed and "a forger can change" in printed
    seal(record, key[0])
    code, printed, _ = verify(capsys, record)
    assert code == 0 and "which proves nothing about who signed" in printed
    code, printed, _ = verify(capsys, record, "--public-key", key[1])
    assert code == 0 and "signed by the key that you trust" in printed and "proves nothing" not in printed


def test_a_bad_record(record, key, capsys):
    code, printed, errors = verify(capsys, record, "--public-key", key[1])
    assert code == 1 and "wrong: the record is not signed" in printed and errors == ""
    (record / "record.md").write_text("All is well.")
    (record / "more").write_text("x")
    code, printed, errors = verify(capsys, record)
    assert code == 1 and errors == "" and printed.endswith(f"{record}: does not verify\n")
    assert "wrong: record.md was changed\n" in printed and "wrong: more is not listed" in printed
    (record / SUMS).unlink()
    code, printed, _ = verify(capsys, record)
    assert code == 1 and f"wrong: {SUMS} is missing" in printed


def test_a_ledger(record, key, capsys):
    ledger = record.parent
    append(ledger, record)
    code, printed, errors = verify(capsys, ledger)
    last = hashlib.sha256((ledger / LEDGER).read_bytes()).hexdigest()
    assert (code, errors) == (0, "") and f"the last line has the SHA-256 {last}; keep it elsewhere" in printed
    assert "1 records" not in printed and "1 record of" in printed and "pass --public-key" in printed
    assert verify(capsys, ledger, "--public-key", key[1])[0] == 1  # its record is not signed
    (record / "record.md").write_text("All is well.")
    code, printed, _ = verify(capsys, ledger)
    assert code == 1 and "wrong: record: record.md was changed" in printed
    (ledger / LEDGER).write_text("{}\n")
    code, printed, _ = verify(capsys, ledger)
    assert code == 1 and "line 1 is broken" in printed and "last line" not in printed


def test_names_of_strangers_do_not_steer_the_terminal(record, capsys):
    (record / "\x1b[2J\n0 files: verified").write_text("x")
    code, printed, _ = verify(capsys, record)
    assert code == 1 and "\x1b" not in printed and r"wrong: '\x1b[2J\n0 files: verified' is not" in printed


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder", "no key", "a private key"])
def test_wrong_use(record, key, tmp_path, capsys, what):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").write_text("junk")
    arguments, message = {
        "nothing": ([tmp_path / "nothing"], "No such file"),
        "a file": ([record / "record.json"], "Not a directory"),
        "an empty folder": ([tmp_path / "empty"], "neither a record nor a ledger"),
        "no key": ([record, "--public-key", tmp_path / "junk"], "not a public key"),
        "a private key": ([record, "--public-key", key[0]], "is a private key"),
    }[what]
    code, printed, errors = verify(capsys, *arguments)
    assert (code, printed) == (2, "") and message in errors and errors.startswith("loku: error: ")


def test_a_verifier_needs_no_torch(record):
    append(record.parent, record)
    code = f"""
import sys
from loku.cli import main
assert main(["record", "verify", {str(record.parent)!r}]) == main(["record", "verify", {str(record)!r}]) == 0
print(*sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "matplotlib"} & set(run.stdout.split())
