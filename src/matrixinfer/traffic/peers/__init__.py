"""What gateways publish to each other, on a best-effort basis: their load per endpoint, and the prompts they sent."""
