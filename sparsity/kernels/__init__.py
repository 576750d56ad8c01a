"""How masked layers compute in compressed phases, and the choice by measurement. What is masked: patterns."""
