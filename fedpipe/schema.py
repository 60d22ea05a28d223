"""The JSON schema of a resolved study: what Snakemake's `validate` reads, in `workflows/schemas/`."""

import json

from fedpipe.config import Study


def schema_text() -> str:
    """The schema, the same text for the same definition of `Study`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Study.model_json_schema()}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
