"""Catalogs on disk: what comes in, what goes out, and when a shard is there. pyarrow only."""

from distsbi.store.catalog import Catalog, Status, open_catalog
from distsbi.store.schema import Format, Output
from distsbi.store.source import SourceSpec, open_source

__all__ = ["Catalog", "Format", "Output", "SourceSpec", "Status", "open_catalog", "open_source"]
