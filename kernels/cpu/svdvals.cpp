#include "svdvals.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

namespace sosd_fast {

#if defined(SOSD_DISPATCH)  // x86-64, by CMake
namespace baseline { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }

static const Kernels& choose() {
    const char* asked = std::getenv("SOSD_ISA");
    const auto wanted = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
    if (wanted("avx512") && __builtin_cpu_supports("x86-64-v4")) return avx512::table;
    if ((wanted("avx2") || wanted("avx512")) && __builtin_cpu_supports("x86-64-v3")) return avx2::table;
    return baseline::table;
}
#else
namespace baseline { extern const Kernels table; }
static const Kernels& choose() { return baseline::table; }
#endif

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

namespace {

// Threads that first take whole matrices and, when none are left, help the matrices still in work.
class Team {
public:
    // A job is open until every index is taken; the opener waits until every index is done.
    void run(int64_t count, void (*task)(void*, int64_t), void* context) {
        if (count > 1 && idle_.load(std::memory_order_relaxed) > 0) {
            Job job{task, context, count};
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                jobs_.push_back(&job);
            }
            wake_.notify_all();
            for (int64_t i; (i = job.next.fetch_add(1)) < count;) task(context, i);
            std::unique_lock<std::mutex> lock(mutex_);
            jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
            done_.wait(lock, [&] { return job.helpers == 0; });
            return;
        }
        for (int64_t i = 0; i < count; ++i) task(context, i);
    }

    bool helpers() const { return idle_.load(std::memory_order_relaxed) > 0; }

    void help_until_finished() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (working_ > 0) {
            Job* job = nullptr;
            for (Job* candidate : jobs_)
                if (candidate->next.load() < candidate->count) job = candidate;
            if (!job) {
                wake_.wait(lock);
                continue;
            }
            ++job->helpers;
            lock.unlock();
            for (int64_t i; (i = job->next.fetch_add(1)) < job->count;) job->task(job->context, i);
            lock.lock();
            if (--job->helpers == 0) done_.notify_all();
        }
        --idle_;
    }

    // A thread that will never own a matrix counts as idle before it runs, so that the first stage already shares.
    void start(int working, int helping) { working_ = working, idle_ = helping; }
    void stop_working() {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++idle_;
        if (--working_ == 0) wake_.notify_all();
    }

private:
    struct Job {
        void (*task)(void*, int64_t);
        void* context;
        int64_t count;
        std::atomic<int64_t> next{0};
        int helpers = 0;
        Job(void (*t)(void*, int64_t), void* c, int64_t n) : task(t), context(c), count(n) {}
    };
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<Job*> jobs_;
    std::atomic<int> idle_{0};
    int working_ = 0;
};

class Workspace {
public:
    template <class T> T* get(int64_t count) {
        const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
        if (bytes > size_) {
            data_.reset();
            data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
            size_ = bytes;
        }
        return reinterpret_cast<T*>(data_.get());
    }

private:
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<char, Free> data_;
    size_t size_ = 0;
};

constexpr double eps_of(Precision p) { return p == Precision::f32 ? 0x1p-24 : 0x1p-53; }

// ||error of S / sum(S)||_2 to be expected of a Gram matrix. Its small eigenvalues, the ones that matter, err by
// 6 / sqrt(r) eps S[0]^2 in root mean square or less in fp32 (13 spectra, r = 4 .. 768). In fp64 they were seen to err
// by 3 eps S[0]^2 on trained 256 x 256 matrices, 8 times as much: its sums run in fewer, longer chains.
// Weights in bf16 and f16 err by up to 2.7 times as much as f32 ones in fp32 (r = 256 .. 768), whose products are exact.
double predicted_error(const double* S, int64_t r, Precision precision, DType dtype) {
    const bool half = dtype == DType::bf16 || dtype == DType::f16;
    const double units = std::max(6 / std::sqrt(double(r)), 0.15) * (precision == Precision::f64 ? 8 : half ? 3 : 1);
    const double dl = units * eps_of(precision) * S[0] * S[0];
    double sum = 0, squares = 0, ds_squares = 0, ds_one_sided = 0;
    for (int64_t i = 0; i < r; ++i) {
        const double s2 = S[i] * S[i];
        const double up = dl / (std::sqrt(s2 + dl) + S[i]);
        const double down = std::min(s2, dl) / (S[i] + std::sqrt(std::max(s2 - dl, 0.0)) + 1e-300);
        const double ds = std::max(up, down);
        sum += S[i];
        squares += s2;
        ds_squares += ds * ds;
        if (s2 < 4 * dl) ds_one_sided += ds;
    }
    return (std::sqrt(ds_squares) + std::sqrt(squares) / sum * ds_one_sided) / sum;
}

constexpr double kAllowedSdError = 3e-7;

template <class T>
void gram_values(const Stages<T>& stages, const Source& w, double* ascending, Workspace& memory, const Parallel& parallel) {
    const int64_t r = w.r, matrix = tiles_of(r).size();
    const int64_t work =
        std::max({stages.gram_work_size(r), stages.tridiagonal_work_size(r), stages.sturm_work_size(r)});
    const int64_t vector = round_up(r, 64);
    T* G = memory.get<T>(matrix + work + 2 * vector);
    T *d = G + matrix, *e = d + vector, *rest = e + vector;
    stages.gram(w, G, rest, parallel);
    stages.tridiagonal(G, r, d, e, rest);
    stages.sturm(d, e, r, sizeof(T) == 4 ? 0x1p-28 : 0x1p-54, ascending, rest, parallel);
}

void solve(SvdvalsTask& t, Workspace& memory, const Parallel& parallel) {
    const bool wide = t.m <= t.n;
    const int64_t r = wide ? t.m : t.n, K = wide ? t.n : t.m;
    if (r <= 0) return;
    Source w{t.data, t.dtype, r, K, wide ? t.row_stride : t.col_stride, wide ? t.col_stride : t.row_stride, 1};
    const Kernels& k = kernels();
    const double largest = k.max_abs(w);
    t.finite = std::isfinite(largest);
    t.predicted_sd_error = 0;
    t.used = t.precision;
    if (t.precision == Precision::automatic)  // what comes in double is expected in double
        t.used = t.dtype == DType::f64 ? Precision::f64 : Precision::f32;
    if (!t.finite || largest == 0) {
        const double value = t.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
        std::fill_n(t.S, r, value);
        if (t.bound) std::fill_n(t.bound, r, value);
        if (!t.finite) t.predicted_sd_error = value;
        return;
    }
    const int limit = t.dtype == DType::f64 ? 1000 : 120;
    const int exponent = std::clamp(-std::ilogb(largest), -limit, limit);
    w.scale = std::ldexp(1.0, exponent);

    std::vector<double> ascending(r);
    if (t.precision == Precision::automatic && t.previous && t.previous[0] > 0) {
        while (t.used != Precision::one_sided && predicted_error(t.previous, r, t.used, t.dtype) >= kAllowedSdError)
            t.used = t.used == Precision::f32 ? Precision::f64 : Precision::one_sided;
    }
    for (;;) {
        if (t.used == Precision::one_sided) {
            k.svdvals_one_sided(w, ascending.data(), memory.get<double>(k.one_sided_work_size(r)), parallel);
            for (int64_t i = 0; i < r; ++i) t.S[i] = ascending[r - 1 - i];
            t.predicted_sd_error = eps_of(t.used) * std::sqrt(double(r));
            break;
        }
        if (t.used == Precision::f32)
            gram_values(k.f32, w, ascending.data(), memory, parallel);
        else
            gram_values(k.f64, w, ascending.data(), memory, parallel);
        for (int64_t i = 0; i < r; ++i) t.S[i] = std::sqrt(ascending[r - 1 - i]);
        t.predicted_sd_error = t.S[0] > 0 ? predicted_error(t.S, r, t.used, t.dtype) : 0;
        if (t.precision != Precision::automatic || t.predicted_sd_error < kAllowedSdError) break;
        t.used = t.used == Precision::f32 ? Precision::f64 : Precision::one_sided;
    }
    if (t.bound) {
        const double s1 = t.S[0], eps = eps_of(t.used);
        if (t.used == Precision::one_sided) {
            // sqrt(K): one rounding per merged row block; 22 eps measured at 16 x 20000, entries in [0, 1]
            std::fill_n(t.bound, r, (8 * std::sqrt(double(r)) + std::sqrt(double(K))) * eps * s1);
        } else {
            const double dl = gram_error_coefficient(r, K) * eps * s1 * s1;
            for (int64_t i = 0; i < r; ++i) {
                const double s2 = t.S[i] * t.S[i];
                const double up = dl / (std::sqrt(s2 + dl) + t.S[i]);
                const double down = s2 > 0 ? std::min(s2, dl) / (t.S[i] + std::sqrt(std::max(s2 - dl, 0.0))) : 0;
                t.bound[i] = std::max(up, down);
            }
        }
        for (int64_t i = 0; i < r; ++i) t.bound[i] = std::ldexp(t.bound[i], -exponent);
    }
    for (int64_t i = 0; i < r; ++i) t.S[i] = std::ldexp(t.S[i], -exponent);
}

double cost(const SvdvalsTask& t) {
    const double r = double(std::min(t.m, t.n)), K = double(std::max(t.m, t.n));
    return r * r * (K + 2 * r + 100);
}

// Below this many operations a thread costs more to start than it saves: as the owner of matrices, and as a mere helper
// (one 256 x 256: 0.41 ms alone, 0.5 to 1.6 with a helper; one 768 x 768: 7.4 and 6.9).
constexpr double kWorthAThread = 2e6, kWorthHelpers = 5e8;

}  // namespace

// Measured maxima over 13 spectra in fp32 (LOG.md): 11 at r = 4, 18 at 16, 24 at 64, 26 at 256, 38 at 768 x 3072.
double gram_error_coefficient(int64_t r, int64_t K) {
    return 32 + 2 * std::sqrt(double(r)) + std::sqrt(double(K)) / 8;
}

void svdvals(SvdvalsTask* tasks, int64_t count, int n_threads) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(tasks[a]) > cost(tasks[b]); });
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += cost(tasks[i]);
    int threads = int(std::clamp(total / kWorthAThread, 1.0, double(std::max(1, n_threads))));
    const int workers = int(std::min<int64_t>(threads, std::max<int64_t>(count, 1)));
    if (total < kWorthHelpers) threads = workers;

    Team team;
    team.start(workers, threads - workers);
    const Parallel parallel{
        &team,
        [](void* t, int64_t n, void (*task)(void*, int64_t), void* c) { static_cast<Team*>(t)->run(n, task, c); },
        [](void* t) { return static_cast<Team*>(t)->helpers(); }};
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    const auto work = [&](bool owner) {
        if (owner) {
            try {
                Workspace memory;
                for (int64_t i; (i = next.fetch_add(1)) < count;) solve(tasks[order[i]], memory, parallel);
            } catch (const std::bad_alloc&) {
                out_of_memory = true;
            }
            team.stop_working();
        }
        team.help_until_finished();
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) {
        try {
            others.emplace_back(work, i < workers);
        } catch (const std::system_error&) {  // no more threads to be had: the others do the work
            for (; i < workers; ++i) team.stop_working();
            break;
        }
    }
    work(true);
    for (std::thread& t : others) t.join();
    if (out_of_memory) throw std::bad_alloc();
}

}  // namespace sosd_fast
