"""The machine that serves: where vLLM's environment is and which address is bound."""

import ipaddress

from prefect.blocks.core import Block
from pydantic import Field, field_validator


class ServingHost(Block):
    """Overrides of a recipe's serving address for one machine."""

    _block_type_name = "Serving Host"
    _block_type_slug = "serving-host"

    host: str = Field(default="127.0.0.1", description="Address to bind; keep loopback behind a proxy of your own.")
    vllm_python: str = Field(default="", description="Python of vLLM's environment; empty: .venv-vllm here.")

    @field_validator("host")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if value != "localhost":
            ipaddress.ip_address(value)  # its ValueError says what was given
        return value

    def client(self) -> dict[str, str]:
        """Return the variables with which the services are started."""
        return {"HOST": self.host, **({"TATARA_VLLM_PYTHON": self.vllm_python} if self.vllm_python else {})}
