"""The seal of a record: digests of all its files, and a signature of the digests.

``SHA256SUMS`` has the format of the program ``sha256sum``. ``SHA256SUMS.sig`` is its Ed25519 signature (RFC
8032, 64 bytes). A seal without a signature finds damage and carelessness. It does not find a forger, who
makes the digests anew. The public key in the folder does not find one either, so a verifier brings the key.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.deletion.record import MAX_BYTES, RECORD, parse_record, read_regular

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SUMS, SIGNATURE, PUBLIC_KEY = "SHA256SUMS", "SHA256SUMS.sig", "public_key.pem"
PASSWORD = "LOKU_KEY_PASSWORD"
_MAX_KEY_BYTES = 64 << 10
_LINE = re.compile(rb"(\\?)([0-9a-f]{64})  ([^\n]+)")
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r"}


@dataclass
class Verification:
    """What ``verify_record`` has found.

    Attributes:
        problems: What is wrong, in words; empty for a good record.
        files: The number of files that were hashed.
        signed_by: The SHA-256 of the public key whose signature holds; None if none does.
        trusted: Whether that key is the one that the verifier brought.
    """

    problems: list[str] = field(default_factory=list)
    files: int = 0
    signed_by: str | None = None
    trusted: bool = False


def shown(name: str) -> str:
    """Return a name of a stranger's file as it may be printed: escaped if it has unprintable characters."""
    return name if name.isprintable() else ascii(name)


def load_key(path: str | os.PathLike) -> Ed25519PrivateKey:
    """Load an Ed25519 private key, as ``openssl genpkey -algorithm ed25519 -out key.pem`` makes it.

    Args:
        path: The file of the key: PEM, PKCS 8. The environment variable LOKU_KEY_PASSWORD has the password of
            an encrypted key.

    Raises:
        ValueError: The file is no such key, or the password is missing or wrong.
        OSError: The file cannot be read.
        ImportError: The package ``cryptography`` is missing.
    """
    serialization, ed25519, _ = _cryptography()
    password = os.environ.get(PASSWORD) or None
    data = _read_key(path)
    encrypted = b"ENCRYPTED" in data
    if encrypted and password is None:
        raise ValueError(f"the key {path} is encrypted: put its password into the environment, as {PASSWORD}")
    try:
        key = serialization.load_pem_private_key(data, password.encode() if encrypted and password else None)
    except Exception as error:  # cryptography has errors of its own for ciphers and kinds that it lacks
        hint = f", or {PASSWORD} is wrong" if encrypted else ""
        raise ValueError(f"{path} is not a private key in PEM{hint}: {error!s:.200}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(
            f"{path} is a key of another kind, {_kind(key)}; records are signed by Ed25519: "
            "openssl genpkey -algorithm ed25519 -out key.pem"
        )
    return key


def load_public_key(path: str | os.PathLike) -> Ed25519PublicKey:
    """Load an Ed25519 public key, as ``openssl pkey -in key.pem -pubout`` makes it.

    Args:
        path: The file of the key, in PEM.

    Raises:
        ValueError: The file is no such key.
        OSError: The file cannot be read.
        ImportError: The package ``cryptography`` is missing.
    """
    return _parse_public_key(_read_key(path), os.fspath(path))


def seal(directory: str | os.PathLike, key: str | os.PathLike | None = None) -> None:
    """Write ``SHA256SUMS`` for all files of a folder and of its folders, and sign it if a key is given.

    A seal that is there makes way. ``public_key.pem`` is a file like the others, so its digest is listed.

    Args:
        directory: The folder of the record.
        key: The file of the private key, as for ``load_key``; None (default) for no signature.

    Raises:
        ValueError: The folder holds something else than files and folders, such as a symbolic link. Or
            ``load_key`` refuses the key. Nothing was written.
        OSError: A file cannot be read or written.
        ImportError: There is a key, and the package ``cryptography`` is missing.
    """
    from loku.saving.directories import whole_file

    directory = Path(directory)
    private = None if key is None else load_key(key)
    if others := _walk(directory)[1]:
        raise ValueError(f"{shown(others[0])} is no regular file, so it cannot be sealed; remove it")
    for name in (SUMS, SIGNATURE, PUBLIC_KEY):
        (directory / name).unlink(missing_ok=True)
    if private is not None:
        serialization, _, _ = _cryptography()
        pem = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with whole_file(directory / PUBLIC_KEY) as unfinished:
            unfinished.write_bytes(pem)
    sums = _sums({name: _file_digest(directory / name) for name in _walk(directory)[0]})
    if private is not None:
        with whole_file(directory / SIGNATURE) as unfinished:
            unfinished.write_bytes(private.sign(sums))
    with whole_file(directory / SUMS) as unfinished:  # the last file: a folder without it has no seal
        unfinished.write_bytes(sums)


def verify(directory: str | os.PathLike, public_key: str | os.PathLike | None = None) -> list[str]:
    """Hash all files of a record again and check its signature; see ``verify_record``.

    Args:
        directory: The folder of the record. Nothing of it is trusted.
        public_key: The file of the public key that the verifier trusts; None (default) for none.

    Returns:
        What is wrong, in words; [] for a good record.
    """
    return verify_record(directory, public_key).problems


def verify_record(directory: str | os.PathLike, public_key: str | os.PathLike | None = None) -> Verification:
    """Hash all files of a record again, and check ``record.json`` and the signature.

    Changed, missing and additional files are found, and whatever is no regular file. Links are not followed,
    and no path of a list is opened.

    Args:
        directory: The folder of the record. Nothing of it is trusted.
        public_key: The file of the public key that the verifier trusts. Its signature must be there. None
            (default) accepts a record without signature, and a signature by the key in the folder, which
            proves nothing about who signed.

    Raises:
        ValueError: ``public_key`` is no Ed25519 key.
        OSError: The folder, or ``public_key``, cannot be read.
        ImportError: There is a signature, and the package ``cryptography`` is missing.
    """
    directory = Path(directory)
    trusted = None if public_key is None else load_public_key(public_key)
    found, others = _walk(directory)
    result = Verification([f"{shown(name)} is no regular file" for name in others])
    digests: dict[str, str] = {}
    for name in found:
        try:
            digests[name] = _file_digest(directory / name)
        except OSError as error:
            result.problems.append(f"{shown(name)} cannot be read: {error.strerror}")
    result.files = len(digests)
    sums = _contents(directory / SUMS, MAX_BYTES, result.problems)
    if sums is not None:
        result.problems += _differences(sums, digests)
    record = _contents(directory / RECORD, MAX_BYTES, result.problems)
    if record is not None:
        try:
            parse_record(record)
        except ValueError as error:
            result.problems.append(f"{RECORD} is broken: {error}")
    _check_signature(directory, sums, trusted, result)
    return result


def sums_digest(directory: str | os.PathLike) -> str:
    """Return the SHA-256 of the ``SHA256SUMS`` of a record: it stands for all its files.

    Args:
        directory: The folder of the record.

    Raises:
        ValueError: ``SHA256SUMS`` is no regular file or too large.
        OSError: ``SHA256SUMS`` cannot be read.
    """
    return hashlib.sha256(read_regular(Path(directory) / SUMS, MAX_BYTES)).hexdigest()


def _walk(directory: Path) -> tuple[list[str], list[str]]:
    """The paths of the regular files that a seal covers, and of all else but folders."""
    files, others, folders = [], [], [""]
    while folders:
        folder = folders.pop()
        for name in os.listdir(directory / folder):
            path = f"{folder}/{name}" if folder else name
            mode = (directory / path).lstat().st_mode
            if stat.S_ISDIR(mode):
                folders.append(path)
            elif not stat.S_ISREG(mode):
                others.append(path)
            elif path not in (SUMS, SIGNATURE):
                files.append(path)
    return sorted(files, key=os.fsencode), sorted(others, key=os.fsencode)


def _file_digest(file: Path) -> str:
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sums(digests: Mapping[str, str]) -> bytes:
    """The contents of ``SHA256SUMS``. A line with an escaped name begins with a backslash."""
    lines = []
    for name in sorted(digests, key=os.fsencode):
        raw = os.fsencode(name)
        escaped = re.sub(rb"[\\\n\r]", lambda match: _ESCAPES[match[0]], raw)
        lines.append((b"" if escaped == raw else b"\\") + digests[name].encode() + b"  " + escaped + b"\n")
    return b"".join(lines)


def _differences(sums: bytes, digests: Mapping[str, str]) -> list[str]:
    """What ``SHA256SUMS`` says and the files do not, in words.

    The bytes are compared as a whole, so that there is one way alone to write a list.
    """
    if sums == _sums(digests):
        return []
    listed: dict[str, str] = {}
    problems = []
    for number, line in enumerate(sums.split(b"\n")[:-1], 1):
        match = _LINE.fullmatch(line)
        name = os.fsdecode(_unescaped(match[3]) if match[1] else match[3]) if match else ""
        if match is None or name in listed:
            problems.append(f"{SUMS}, line {number} is broken")
        elif name.startswith("/") or ".." in name.split("/"):
            problems.append(f"{SUMS}, line {number} names {shown(name)}, which is outside of the record")
        else:
            listed[name] = match[2].decode()
    changed = [name for name, digest in listed.items() if digests.get(name, digest) != digest]
    problems += [f"{shown(name)} was changed" for name in changed]
    problems += [f"{shown(name)} is missing" for name in listed if name not in digests]
    problems += [f"{shown(name)} is not listed in {SUMS}" for name in digests if name not in listed]
    return problems or [f"{SUMS} is not in the form that a seal has"]


def _unescaped(name: bytes) -> bytes:
    back = {escape: raw for raw, escape in _ESCAPES.items()}
    return re.sub(rb"\\[\\nr]", lambda match: back[match[0]], name)


def _contents(file: Path, most_bytes: int, problems: list[str]) -> bytes | None:
    """The contents of a file that a record must have, or None and a problem."""
    try:
        return read_regular(file, most_bytes)
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except ValueError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror}")
    return None


def _check_signature(
    directory: Path, sums: bytes | None, trusted: Ed25519PublicKey | None, result: Verification
) -> None:
    has_signature, has_key = (os.path.lexists(directory / name) for name in (SIGNATURE, PUBLIC_KEY))
    if not has_signature:
        if trusted is not None:
            result.problems.append("the record is not signed, and a signature was asked for")
        elif has_key:
            result.problems.append(f"{SIGNATURE} is missing, although there is a {PUBLIC_KEY}")
        return
    signature = _contents(directory / SIGNATURE, 64, result.problems)
    pem = _contents(directory / PUBLIC_KEY, _MAX_KEY_BYTES, result.problems)
    if signature is None or sums is None or pem is None:
        return
    try:
        key = _parse_public_key(pem, PUBLIC_KEY)
    except ValueError as error:
        result.problems.append(str(error))
        return
    if trusted is not None and key_digest(trusted) != key_digest(key):
        result.problems.append(f"{PUBLIC_KEY} is not the key that you trust: another key signed the record")
        return
    _, _, exceptions = _cryptography()
    try:
        key.verify(signature, sums)
    except exceptions.InvalidSignature:
        result.problems.append(f"{SIGNATURE} is not a signature of {SUMS} by the key")
        return
    result.signed_by, result.trusted = key_digest(key), trusted is not None


def key_digest(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 of the 32 bytes of a public key, by which two keys are compared."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise ImportError(
            "signatures need the package cryptography: pip install 'loku-kernels[sign]'"
        ) from error
    return serialization, ed25519, exceptions


def _read_key(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as stream:
        data = stream.read(_MAX_KEY_BYTES + 1)
    if len(data) > _MAX_KEY_BYTES:
        raise ValueError(f"{path} is not a key: it has more than {_MAX_KEY_BYTES} bytes")
    return data


def _parse_public_key(pem: bytes, name: str) -> Ed25519PublicKey:
    serialization, ed25519, _ = _cryptography()
    if b"PRIVATE KEY" in pem:
        raise ValueError(
            f"{name} is a private key; verification needs the public one: "
            "openssl pkey -in key.pem -pubout -out public_key.pem"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception as error:  # cryptography has errors of its own for kinds that it lacks
        raise ValueError(f"{name} is not a public key in PEM: {error!s:.200}") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"{name} is a key of another kind, {_kind(key)}; records are signed by Ed25519")
    return key


def _kind(key: object) -> str:
    return type(key).__name__.lstrip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
