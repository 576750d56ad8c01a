"""How masked layers compute in compressed phases, chosen by measurement. Which weights stay: patterns."""
