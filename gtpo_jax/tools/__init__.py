"""Tool calls: how they are written (`toolcall`) and where they run (`sandbox`, `worker`)."""
