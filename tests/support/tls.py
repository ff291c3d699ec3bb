"""A TLS server in front of a Valkey, because the tests' Valkey has no TLS."""

import asyncio
import ssl
from datetime import datetime
from pathlib import Path

import trustme

from nanoservice.testing.valkey import Valkey


class TlsFront:
    """A TLS server that decrypts the client's bytes and passes these bytes on to a Valkey without TLS."""

    def __init__(self, valkey: Valkey, folder: Path) -> None:
        self.valkey = valkey
        self.ca_file, self.cert_file, self.key_file = folder / "ca.pem", folder / "client.pem", folder / "client.key"
        self.rotate()
        self.port = self.clients = 0

    def rotate(self) -> None:
        """Create a new certificate authority, and write its certificate and a client's certificate and key into the files."""
        self.authority = trustme.CA()
        self.authority.cert_pem.write_to_path(str(self.ca_file))
        client = self.authority.issue_cert("client@example.org")
        client.cert_chain_pems[0].write_to_path(str(self.cert_file))
        client.private_key_pem.write_to_path(str(self.key_file))

    async def start(self, name: str = "127.0.0.1", expires: datetime | None = None) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.authority.issue_cert(name, not_after=expires).configure_cert(context)
        self.authority.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients += 1
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.valkey.port)
        try:
            await asyncio.gather(_pass_on(reader, upstream_writer), _pass_on(upstream_reader, writer))
        except asyncio.CancelledError:  # the test ends before the connection does
            for each in (writer, upstream_writer):
                each.transport.abort()

    def environ(self, **more: str) -> dict[str, str]:
        files = {"REDIS_CA_FILE": str(self.ca_file), "REDIS_CERT_FILE": str(self.cert_file), "REDIS_KEY_FILE": str(self.key_file)}
        tls = {"REDIS_PORT": str(self.port), "REDIS_TLS": "true", **files, **more}
        return {name: value for name, value in self.valkey.environ(**tls).items() if value}


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (OSError, ssl.SSLError):
        pass
    writer.close()
