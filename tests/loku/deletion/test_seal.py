"""Seals: digests of all files of a record, and their signature."""

import os
import shutil
import subprocess
import sys

import pytest
from deletion_facts import facts

from loku.deletion.record import MAX_BYTES, RECORD, write_record
from loku.deletion.seal import (
    PASSWORD,
    PUBLIC_KEY,
    SIGNATURE,
    SUMS,
    load_key,
    load_public_key,
    seal,
    sums_digest,
    verify,
    verify_record,
)

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

ODD = [
    "with space",
    "new\nline",
    "back\\slash",
    "return\r",
    "\\n",
    "-c",
    "é",
    "*star",
    os.fsdecode(b"\xff.bin"),
]


def save_key(path, key, password=None):
    how = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, how))
    return path


def save_public_key(path, key):
    public = key.public_key()
    path.write_bytes(public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The files of a private key, its public key, and the public key of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    ours, theirs = (ed25519.Ed25519PrivateKey.generate() for _ in range(2))
    return (
        save_key(folder / "key.pem", ours),
        save_public_key(folder / "trusted_key.pem", ours),
        save_public_key(folder / "their_key.pem", theirs),
    )


@pytest.fixture()
def record(tmp_path):
    """A record with few facts, which has no pictures, and with a model."""
    folder = tmp_path / "record"
    (folder / "adapter").mkdir(parents=True)
    write_record(folder, facts(measures=None, training=None, attacks=None))
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    return folder


def flipped(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# Digests


def test_sha256sum_reads_the_list(record):
    (record / "serving").mkdir()
    for name in ODD:
        (record / "serving" / name).write_bytes(os.fsencode(name))
    seal(record)
    assert verify(record) == []
    lines = (record / SUMS).read_bytes().splitlines()
    assert len(lines) == len(ODD) + 4
    if not shutil.which("sha256sum"):
        pytest.skip("needs sha256sum")
    checked = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=record, capture_output=True)
    assert checked.returncode == 0 and checked.stdout.count(b": OK\n") == len(ODD) + 4
    written = subprocess.run(
        ["sha256sum", "--", *(f"serving/{name}" for name in ODD)], cwd=record, capture_output=True, check=True
    )
    # The very lines of sha256sum, escapes included.
    assert set(written.stdout.splitlines()) <= set(lines)


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_a_changed_byte_anywhere_is_found(record, keys, signed):
    seal(record, keys[0] if signed else None)
    assert verify(record) == []
    names = {path.name for path in files_of(record)}
    assert names >= {RECORD, "record.md", "record.html", "adapter_model.safetensors", SUMS}
    assert names >= {SIGNATURE, PUBLIC_KEY} or not signed
    for file in files_of(record):
        whole = file.read_bytes()
        small = file.name in (SUMS, SIGNATURE, PUBLIC_KEY)
        for place in range(len(whole)) if small else (0, len(whole) // 2, len(whole) - 1):
            flipped(file, place)
            assert verify(record), f"byte {place} of {file.name}"
            file.write_bytes(whole)
    assert verify(record) == []


def test_every_kind_of_change_is_named(record):
    seal(record)
    flipped(record / "record.md", 3)
    (record / "record.html").unlink()
    (record / "adapter" / "more.bin").write_bytes(b"x")
    (record / "adapter" / "link").symlink_to(record / RECORD)
    (record / "folder").symlink_to(record / "adapter")
    os.mkfifo(record / "pipe")
    assert sorted(verify(record)) == [
        "adapter/link is no regular file",
        f"adapter/more.bin is not listed in {SUMS}",
        "folder is no regular file",
        "pipe is no regular file",
        "record.html is missing",
        "record.md was changed",
    ]


def test_a_file_that_became_a_link_is_not_followed(record, tmp_path):
    seal(record)
    (tmp_path / "same").write_bytes((record / "record.md").read_bytes())
    (record / "record.md").unlink()
    (record / "record.md").symlink_to(tmp_path / "same")
    assert sorted(verify(record)) == ["record.md is missing", "record.md is no regular file"]


def rewritten(record, change):
    """Seal a record again by hand, as a forger would, after a change of the list."""
    seal(record)
    (record / SUMS).write_bytes(change((record / SUMS).read_bytes()))
    return verify(record)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda sums: sums + b"0" * 64 + b"  ../secret\n", "which is outside of the record"),
        (lambda sums: sums + b"0" * 64 + b"  /etc/passwd\n", "which is outside of the record"),
        (lambda sums: sums + b"0" * 64 + b"  adapter/../../x\n", "which is outside of the record"),
        (lambda sums: sums + b"0" * 64 + b"  nothing\n", "nothing is missing"),
        (lambda sums: sums + sums.splitlines(keepends=True)[0], "is broken"),
        (lambda sums: sums + b"no line\n", "is broken"),
        (lambda sums: sums[:-1], "is not listed in"),
        (lambda sums: b"".join(reversed(sums.splitlines(keepends=True))), "not in the form"),
        (lambda sums: sums.replace(b"  ", b" *"), "is broken"),
        (lambda sums: sums + b"0" * 64 + b"  \x1b[2Jx\n", r"'\x1b[2Jx' is missing"),
        (lambda sums: b"", "is not listed in"),
    ],
    ids="parent root inside missing twice junk cut order binary escape empty".split(),
)
def test_a_hostile_list_is_refused(record, change, problem):
    assert any(problem in found for found in rewritten(record, change))


@pytest.mark.parametrize("name", [SUMS, RECORD])
def test_a_huge_or_strange_file_is_refused(record, name):
    seal(record)
    with open(record / name, "r+b") as stream:
        stream.truncate(MAX_BYTES + 1)
    assert any("more than" in problem for problem in verify(record))
    (record / name).unlink()
    assert f"{name} is missing" in verify(record)
    (record / name).mkdir()
    assert f"{name} is not a regular file" in verify(record)
    (record / name).rmdir()
    os.mkfifo(record / name)
    assert f"{name} is not a regular file" in verify(record)


def test_a_broken_record_is_found_under_a_good_seal(record):
    (record / RECORD).write_text('{"schema": 1}')
    seal(record)
    assert verify(record) == [f"{RECORD} is broken: the record has no 'outcome'"]


def test_a_seal_makes_way_for_the_next(record, keys):
    seal(record, keys[0])
    first = sums_digest(record)
    (record / "more").write_text("x")
    seal(record)
    assert sums_digest(record) != first and verify(record) == []
    assert not (record / SIGNATURE).exists() and not (record / PUBLIC_KEY).exists()


def test_a_link_is_not_sealed(record):
    (record / "link").symlink_to(record / RECORD)
    with pytest.raises(ValueError, match="link is no regular file"):
        seal(record)
    assert not (record / SUMS).exists()


# Signatures


def test_a_signature_is_that_of_the_trusted_key(record, keys):
    key, trusted, other = keys
    seal(record, key)
    assert verify(record, trusted) == []
    found = verify_record(record, trusted)
    assert found.trusted and found.signed_by and found.files == 5
    assert not verify_record(record).trusted  # the key in the folder proves nothing
    assert any("not the key that you trust" in problem for problem in verify(record, other))
    assert len((record / SIGNATURE).read_bytes()) == 64
    # The same as by hand, and the key of the folder is the trusted one.
    load_public_key(trusted).verify((record / SIGNATURE).read_bytes(), (record / SUMS).read_bytes())
    assert (record / PUBLIC_KEY).read_bytes() == trusted.read_bytes()


def test_a_forger_needs_the_key(record, keys, tmp_path):
    """A changed record that was sealed again is found by the key alone."""
    key, trusted, _ = keys
    seal(record, key)
    (record / "record.md").write_text("All is well.")
    seal(record)
    assert verify(record) == [] and verify_record(record).signed_by is None
    assert verify(record, trusted) == ["the record is not signed, and a signature was asked for"]
    seal(record, save_key(tmp_path / "new.pem", ed25519.Ed25519PrivateKey.generate()))
    assert verify(record) == []
    assert any("not the key that you trust" in problem for problem in verify(record, trusted))
    # The public key of the owner beside a signature of the forger.
    (record / PUBLIC_KEY).write_bytes(trusted.read_bytes())
    assert any("is not a signature" in problem for problem in verify(record, trusted))


def test_a_lost_part_of_a_signature_is_found(record, keys):
    seal(record, keys[0])
    (record / SIGNATURE).rename(record.parent / "signature")
    assert verify(record) == [f"{SIGNATURE} is missing, although there is a {PUBLIC_KEY}"]
    (record.parent / "signature").rename(record / SIGNATURE)
    (record / PUBLIC_KEY).unlink()
    assert f"{PUBLIC_KEY} is missing" in verify(record)
    (record / SIGNATURE).write_bytes(bytes(65))
    assert any(f"{SIGNATURE} has 65 bytes" in problem for problem in verify(record))


def test_openssl_makes_keys_and_verifies(record, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")

    def openssl(*arguments):
        return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, check=False)

    key, public = tmp_path / "key.pem", tmp_path / "trusted_key.pem"
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", key).returncode == 0
    assert openssl("pkey", "-in", key, "-pubout", "-out", public).returncode == 0
    seal(record, key)
    assert verify(record, public) == []
    arguments = ["pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", record / SUMS]
    arguments += ["-sigfile", record / SIGNATURE]
    if b"rawin" not in openssl("pkeyutl", "-help").stderr:
        pytest.skip("needs openssl 3")
    assert openssl(*arguments).returncode == 0
    flipped(record / SUMS, 0)
    assert openssl(*arguments).returncode != 0


def test_an_encrypted_key_needs_its_password(record, keys, tmp_path, monkeypatch):
    monkeypatch.delenv(PASSWORD, raising=False)
    key = save_key(tmp_path / "key.pem", ed25519.Ed25519PrivateKey.generate(), b"correct horse")
    with pytest.raises(ValueError, match=f"encrypted.*{PASSWORD}"):
        load_key(key)
    monkeypatch.setenv(PASSWORD, "wrong")
    with pytest.raises(ValueError, match=f"{PASSWORD} is wrong"):
        load_key(key)
    monkeypatch.setenv(PASSWORD, "correct horse")
    seal(record, key)
    assert verify(record) == []
    load_key(keys[0])  # a password of another key does no harm


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: rsa.generate_private_key(65537, 1024), "RSA"),
        (lambda: ec.generate_private_key(ec.SECP256R1()), "EllipticCurve|EC"),
        (lambda: ed448.Ed448PrivateKey.generate(), "Ed448"),
    ],
    ids=["rsa", "ec", "ed448"],
)
def test_other_keys_are_refused_by_name(record, tmp_path, make, kind):
    other = make()
    with pytest.raises(ValueError, match=f"another kind, .*({kind})"):
        seal(record, save_key(tmp_path / "key.pem", other))
    assert not (record / SUMS).exists()
    with pytest.raises(ValueError, match=f"another kind, .*({kind})"):
        load_public_key(save_public_key(tmp_path / "public.pem", other))


def test_files_that_are_no_keys_are_refused(keys, tmp_path):
    junk = tmp_path / "junk"
    junk.write_text("no key")
    with pytest.raises(ValueError, match="not a private key in PEM"):
        load_key(junk)
    with pytest.raises(ValueError, match="not a public key in PEM"):
        load_public_key(junk)
    with pytest.raises(ValueError, match="not a private key"):
        load_key(keys[1])
    with pytest.raises(ValueError, match="is a private key; verification needs the public one"):
        load_public_key(keys[0])
    with pytest.raises(ValueError, match="more than 65536 bytes"):
        load_public_key("/dev/zero")
    with pytest.raises(FileNotFoundError):
        load_key(tmp_path / "nothing")


def test_without_the_package_an_unsigned_record_still_verifies(record, keys, monkeypatch):
    seal(record, keys[0])
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ImportError, match=r"pip install 'loku-kernels\[sign\]'"):
        verify(record)
    with pytest.raises(ImportError, match=r"pip install 'loku-kernels\[sign\]'"):
        load_key(keys[0])
    seal(record)
    assert verify(record) == []
