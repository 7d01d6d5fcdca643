// Scratch memory of the kernels. A kernel takes each array where it uses it, so that a size is written once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace sosd_fast {

// Hands out 64-byte aligned, uninitialised pieces and takes them back in reverse order. One thread uses it.
// With SOSD_SANITIZE every piece is an allocation of its exact size, filled with 0xff (NaN), so that AddressSanitizer
// sees any access beyond it and a value read before it was written shows; without, pieces are cut from large blocks.
class Arena {
public:
    Arena();
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // Throws std::bad_alloc, also where count * size is beyond the address space.
    void* take(int64_t count, int64_t size);

private:
    friend class ArenaScope;
    struct State;
    State* state_;
};

// What is taken from the arena during the life of a scope is given back at its end.
class ArenaScope {
public:
    explicit ArenaScope(Arena& arena);
    ~ArenaScope();
    ArenaScope(const ArenaScope&) = delete;
    ArenaScope& operator=(const ArenaScope&) = delete;

private:
    Arena& arena_;
    int64_t block_, used_;
};

#if defined(SOSD_SANITIZE)
// Makes the nth piece that any arena hands out from now on one element too short (0: none), to show that it is noticed.
void shorten_piece(int64_t nth);
int64_t pieces_taken();
int64_t piece_size(int64_t nth);  // bytes asked for
#endif

template <class T> [[gnu::always_inline]] inline T* take(Arena& arena, int64_t count) {
    return static_cast<T*>(arena.take(count, sizeof(T)));
}
}  // namespace sosd_fast
