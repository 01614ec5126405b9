"""The page for programs: endpoints over HTTP, and tools for MCP clients."""
