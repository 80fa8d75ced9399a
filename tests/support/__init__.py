"""What several tests share: tiny models, stand-ins, contracts."""
