"""Connection details, kept by Prefect: secrets leave a block only through the client it builds."""
