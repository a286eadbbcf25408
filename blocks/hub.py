"""The Hugging Face account that models are read from and published to."""

from huggingface_hub import HfApi
from prefect.blocks.core import Block
from pydantic import Field, SecretStr


class HubAccount(Block):
    """A token for the Hub; which repo is written to is the recipe's choice."""

    _block_type_name = "Hub Account"
    _block_type_slug = "hub-account"

    token: SecretStr | None = Field(default=None, description="Token; write access is needed to publish.")
    endpoint: str = Field(default="", description="Another Hub's address; empty: the public one or HF_ENDPOINT.")

    def client(self) -> HfApi:
        """Build a client. The token leaves the block only here; without one the Hub is read anonymously."""
        token = (self.token.get_secret_value().strip() if self.token else "") or False
        return HfApi(endpoint=self.endpoint or None, token=token)
