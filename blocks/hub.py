"""The Hugging Face account that models are read from and published to."""

from huggingface_hub import HfApi
from prefect.blocks.core import Block
from pydantic import Field, SecretStr


class HubAccount(Block):
    """A token and the namespace that it may write to."""

    _block_type_name = "Hub Account"
    _block_type_slug = "hub-account"

    namespace: str = Field(default="", description="User or organisation that owns published models.")
    token: SecretStr | None = Field(default=None, description="Token; write access is needed to publish.")
    endpoint: str = Field(default="", description="Another Hub's address; empty: the public one or HF_ENDPOINT.")

    def client(self) -> HfApi:
        """Build a client. The token leaves the block only here; without one the Hub is read anonymously."""
        token = self.token.get_secret_value() if self.token else False
        return HfApi(endpoint=self.endpoint or None, token=token)
