"""Keys and certificates of a fleet: a CA, the head's certificate, a key for each site.

By `cryptography`, which Flower brings. Curves are NIST's: Flower takes no others for its nodes.
"""

import datetime
import hashlib
import ipaddress
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pilot.errors import PilotError
from pilot.fleet.secret_file import read_secret, write_secret

CA_DAYS, SERVER_DAYS = 3650, 825  # the second is the longest that Apple's and others' TLS accept
_RENEW_DAYS = 90  # a certificate that ends sooner is made again at the next start
_BEFORE = datetime.timedelta(days=1)  # for sites whose clock is late
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_FIND_ROUTE_TO = ("192.0.2.1", 9)  # TEST-NET-1: connecting a UDP socket sends nothing


class Authority:
    """The CA of a head, in its directory; made at the first use."""

    def __init__(self, directory: Path) -> None:
        self.certificate_path, key_path = directory / "ca.pem", directory / "ca.key"
        self._server, self._server_key = directory / "server.pem", directory / "server.key"
        if not self.certificate_path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            write_secret(key_path, _private(key))
            write_secret(self.certificate_path, _authority(key).public_bytes(_PEM))
        self._key = _load_key(key_path)
        self.pem = read_secret(self.certificate_path)
        self._certificate = x509.load_pem_x509_certificate(self.pem)

    @property
    def fingerprint(self) -> bytes:
        return fingerprint(self.pem)

    def server(self, addresses: Iterable[str]) -> tuple[Path, Path]:
        """The paths of certificate and key for these names and IP addresses, made again where need be."""
        names = sorted({*addresses, *_LOOPBACK})
        try:
            made = x509.load_pem_x509_certificate(read_secret(self._server))
            left = made.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
            if _names_of(made) == names and left > datetime.timedelta(days=_RENEW_DAYS):
                read_secret(self._server_key)
                return self._server, self._server_key
        except FileNotFoundError:
            pass
        key = ec.generate_private_key(ec.SECP256R1())
        write_secret(self._server_key, _private(key))
        write_secret(self._server, self._sign(key, names).public_bytes(_PEM))
        return self._server, self._server_key

    def _sign(self, key: ec.EllipticCurvePrivateKey, names: list[str]) -> x509.Certificate:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        builder = _builder("pilot head", key.public_key(), self._key.public_key(), SERVER_DAYS)
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(alternatives, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def fingerprint(pem: bytes) -> bytes:
    """SHA-256 of a certificate, 32 bytes. Raises ValueError if `pem` is none."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))).digest()


def site_key(path: Path) -> str:
    """The public half, in OpenSSH's form, of the key at `path`, which is made if it is missing."""
    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.OpenSSH  # the only one that Flower reads
        write_secret(path, key.private_bytes(_PEM, form, serialization.NoEncryption()))
    read = serialization.load_ssh_private_key(read_secret(path), password=None)
    public = read.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return public.decode("ascii")


def check_site_key(text: str) -> None:
    """Raise ValueError unless `text` is a public key that Flower takes."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError("the public key cannot be read") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or len(text) > 1000 or "\n" in text:
        raise ValueError("the public key is not one line with a key on a NIST curve")


def found_addresses() -> list[str]:
    """Names and addresses by which other machines may reach this one; the likeliest first."""
    found = [address for address in [_outward_address()] if address]
    found += [name for name in (socket.gethostname(), socket.getfqdn()) if _is_name(name)]
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and "%" not in entry.address:
                found.append(entry.address)
    return [name for name in dict.fromkeys(found) if name not in _LOOPBACK]


def check_address(name: str) -> None:
    """Raise PilotError unless `name` can stand in a certificate: an IP address or a host's name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not _is_name(name):
            raise PilotError(
                f'"{name}" is neither an IP address nor the name of a host (without a port)'
            ) from None


def _outward_address() -> str:
    """The address of the interface with the default route, "" without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_FIND_ROUTE_TO)
            return str(probe.getsockname()[0])
        except OSError:
            return ""


_PEM = serialization.Encoding.PEM


def _is_name(name: str) -> bool:
    labels = name.split(".")
    return len(name) <= 253 and all(
        0 < len(label) <= 63 and label.replace("-", "").isalnum() and label.isascii()
        for label in labels
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_of(certificate: x509.Certificate) -> list[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return sorted(str(name.value) for name in found)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(read_secret(path), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PilotError(f"{path} is not the CA's key: restore it, or remove {path.parent}")
    return key


def _builder(
    name: str, key: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .issuer_name(_common_name("pilot CA"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    signs = {"digital_signature", "key_cert_sign", "crl_sign"}
    others = {"content_commitment", "key_encipherment", "data_encipherment", "key_agreement"}
    others |= {"encipher_only", "decipher_only"}
    usage = x509.KeyUsage(**dict.fromkeys(signs, True), **dict.fromkeys(others, False))
    return (
        _builder("pilot CA", key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
