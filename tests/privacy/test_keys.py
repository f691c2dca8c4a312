"""Keys: signatures of run keys, a roster, and files that only their owner reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedloom.errors import ConfigError, RoundError, RunError
from fedloom.privacy.keys import Identity, RunKey, check_roster, check_signature
from fedloom.privacy.secret import derive, joined, secret_file


def test_two_parties_share_a_secret_that_a_third_does_not() -> None:
    a, b, c = RunKey(), RunKey(), RunKey()
    assert a.shared(b.public) == b.shared(a.public) != c.shared(a.public)
    with pytest.raises(RoundError, match=r"none of X25519"):
        a.shared(bytes(32))  # a point of small order: the secret would be known
    assert "secret" not in repr(a) + repr(Identity())


def test_derived_keys_differ_in_purpose_and_contexts_are_unambiguous() -> None:
    assert derive(b"s" * 32, "pair", 1) != derive(b"s" * 32, "box", 1)
    assert joined("ab", "c") != joined("a", "bc") and joined(1, 23) != joined(12, 3)
    assert len(derive(b"s" * 32, "x", length=16)) == 16


def test_rfc_5869_without_salt() -> None:
    """Test case 3 has an empty info; ours always says what for, so the library is checked through one part."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    made = HKDF(hashes.SHA256(), 42, salt=None, info=b"").derive(bytes([0x0B] * 22))
    assert made.hex().startswith("8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d")


def test_a_roster_tells_a_swapped_key() -> None:
    north, south, key = Identity(), Identity(), RunKey().public
    roster = {"north": north.name, "south": south.name}
    check_roster(roster)
    signature = north.sign("run", "north", key)
    check_signature(roster, "run", "north", key, signature)
    for run, client, other, why in (
        ("run", "north", RunKey().public, "is not signed by its identity"),
        ("another", "north", key, "is not signed by its identity"),
        ("run", "south", key, "is not signed by its identity"),
        ("run", "west", key, "'west' is not in the roster"),
    ):
        with pytest.raises(RoundError, match=why):
            check_signature(roster, run, client, other, signature)
    for wrong in ("ed25519:12", north.name.removeprefix("ed25519:"), "ed25519:" + "g" * 64):
        with pytest.raises(ConfigError, match=r"expected ed25519: and 64 hexadecimal digits"):
            check_roster({"north": wrong})


def test_secret_files_stay_and_are_their_owners(tmp_path: Path) -> None:
    path = tmp_path / "noise.key"
    key = secret_file(path)
    assert len(key) == 32 and secret_file(path) == key and path.stat().st_mode & 0o777 == 0o600
    assert secret_file(tmp_path / "other.key") != key
    path.write_bytes(b"short")
    with pytest.raises(RunError, match="expected a key of 32"):
        secret_file(path)
