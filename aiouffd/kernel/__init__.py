"""The kernel's interface, typed; no event loop, no policy.

Layout: `abi` (numbers and structs), `events` (the 32-byte messages), `userfaultfd` (the descriptor: a method an
ioctl), `region` (memory that can be registered), `memory` (addresses of buffers, sealed memfds), `libc` (system
calls that the standard library lacks), `write_tracker` (which pages were written).
"""
