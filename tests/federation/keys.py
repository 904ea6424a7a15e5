"""What a SuperLink with TLS and node authentication needs, as docs/deployment-by-hand.md makes it."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


class Keys:
    """A certificate authority, a server's certificate for 127.0.0.1, and a key for each site."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.ca, self.server = directory / "ca.pem", directory / "server.pem"
        self.server_key = directory / "server.key"
        authority, server = _new_key(), _new_key()
        self.ca.write_bytes(_certificate(authority, authority, ca=True))
        self.server.write_bytes(_certificate(server, authority, ca=False))
        self.server_key.write_bytes(_private(server, PrivateFormat.PKCS8))

    def superlink_options(self) -> list[str]:
        files = ["--ssl-ca-certfile", self.ca, "--ssl-certfile", self.server]
        files += ["--ssl-keyfile", self.server_key]
        return [*map(str, files), "--enable-supernode-auth"]

    def of_site(self, name: str) -> Path:
        """The path of a new private key; the public one is beside it, with `.pub`."""
        path, key = self.directory / name, _new_key()
        path.write_bytes(_private(key, PrivateFormat.OpenSSH))
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        path.with_suffix(".pub").write_bytes(public)
        return path


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, *, ca: bool
) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name("pilot CA" if ca else "pilot"))
        .issuer_name(_name("pilot CA"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if ca:
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    else:
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)
