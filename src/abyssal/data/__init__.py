"""From text to batches: `corpus` reads documents, `tokenizer` turns them into ids, `shards` keeps the ids on disk
(`store` knows the files), `loader` deals them out as windows and can resume."""
