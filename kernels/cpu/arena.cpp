#include "arena.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace sosd_fast {

namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int64_t kSmallestBlock = 1 << 16;

struct Free {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
using Memory = std::unique_ptr<char, Free>;

Memory allocate(int64_t bytes) { return Memory(static_cast<char*>(::operator new(size_t(bytes), kAlignment))); }

}  // namespace

struct Arena::State {
    struct Block {
        Memory memory;
        int64_t size, used;
    };
    std::vector<Block> blocks;
    int64_t block = 0;  // the one that pieces are cut from; with SOSD_SANITIZE the number of pieces
};

Arena::Arena() : state_(new State) {}
Arena::~Arena() { delete state_; }

#if defined(SOSD_SANITIZE)

static std::atomic<int64_t> taken{0}, shortened{0};
static std::atomic<int64_t> sizes[4096];

void shorten_piece(int64_t nth) { taken = 0, shortened = nth; }
int64_t pieces_taken() { return taken; }
int64_t piece_size(int64_t nth) { return sizes[nth % 4096]; }

void* Arena::take(int64_t count, int64_t size) {
    if (count < 0 || count > INT64_MAX / size - 64) throw std::bad_alloc();
    const int64_t nth = ++taken, bytes = std::max<int64_t>(count * size - (nth == shortened ? size : 0), 0);
    if (!shortened) sizes[nth % 4096] = count * size;
    state_->blocks.push_back({allocate(bytes), bytes, bytes});
    std::memset(state_->blocks.back().memory.get(), 0xff, size_t(bytes));
    return state_->blocks.back().memory.get();
}

ArenaScope::ArenaScope(Arena& arena) : arena_(arena), block_(int64_t(arena.state_->blocks.size())), used_(0) {}
ArenaScope::~ArenaScope() { arena_.state_->blocks.resize(size_t(block_)); }

#else

void* Arena::take(int64_t count, int64_t size) {
    if (count < 0 || count > INT64_MAX / size - 64) throw std::bad_alloc();
    const int64_t bytes = round_up(std::max<int64_t>(count * size, 1), 64);
    State& s = *state_;
    while (s.block < int64_t(s.blocks.size())) {
        State::Block& b = s.blocks[size_t(s.block)];
        if (b.size - b.used >= bytes) {
            b.used += bytes;
            return b.memory.get() + b.used - bytes;
        }
        if (b.used == 0) break;  // too small and empty: a larger one takes its place
        ++s.block;
    }
    int64_t held = 0;
    for (const State::Block& b : s.blocks) held += b.size;
    const int64_t fresh = std::max({bytes, held / 2, kSmallestBlock});  // few blocks, whatever comes
    s.blocks.resize(size_t(s.block));
    s.blocks.push_back({allocate(fresh), fresh, bytes});
    return s.blocks.back().memory.get();
}

ArenaScope::ArenaScope(Arena& arena) : arena_(arena), block_(arena.state_->block), used_(0) {
    const auto& blocks = arena.state_->blocks;
    if (block_ < int64_t(blocks.size())) used_ = blocks[size_t(block_)].used;
}

ArenaScope::~ArenaScope() {
    auto& blocks = arena_.state_->blocks;
    for (size_t i = size_t(block_) + 1; i < blocks.size(); ++i) blocks[i].used = 0;
    if (block_ < int64_t(blocks.size())) blocks[size_t(block_)].used = used_;
    arena_.state_->block = block_;
}

#endif

}  // namespace sosd_fast
