/* Threads for cpu_forward.c: `together` runs a function on some of them, inside it `meet` waits for all.

   A thread that waits spins for a moment, since its turn mostly comes within microseconds, and then sleeps: nothing
   burns between two steps or where threads have to share a core. No OpenMP: its runtime would be a second one beside
   torch's, whose threads spin for longer. */

#include <pthread.h>
#include <stdint.h>
#include <unistd.h>

#define SPINS 2000 /* pauses, some 50 us */
#define MOST_THREADS 64

static struct {
    pthread_mutex_t turn, lock; /* one caller at a time; for `woken` */
    pthread_cond_t woken;
    uint32_t sleepers, arrived, phase;
    uint32_t order; /* a count of the calls, times 256, and how many threads are to work */
    uint32_t seen[MOST_THREADS];
    int workers;
    pid_t owner; /* a fork inherits no threads */
    void (*work)(const void *, int, int);
    const void *job;
} pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .woken = PTHREAD_COND_INITIALIZER};

static void set(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.sleepers, __ATOMIC_SEQ_CST)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.woken);
        pthread_mutex_unlock(&pool.lock);
    }
}

static void await_change(uint32_t *word, uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old) return;
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#endif
    }
    pthread_mutex_lock(&pool.lock);
    __atomic_add_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(word, __ATOMIC_SEQ_CST) == old) pthread_cond_wait(&pool.woken, &pool.lock);
    __atomic_sub_fetch(&pool.sleepers, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&pool.lock);
}

/* Nobody passes before all have come. */
static void meet(int threads) {
    if (threads == 1) return;
    uint32_t phase = __atomic_load_n(&pool.phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&pool.arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)threads) {
        __atomic_store_n(&pool.arrived, 0, __ATOMIC_RELAXED);
        set(&pool.phase, phase + 1);
    } else {
        await_change(&pool.phase, phase);
    }
}

static void *worker(void *number) {
    int me = (int)(intptr_t)number;
    for (uint32_t order = pool.seen[me];;) {
        await_change(&pool.order, order);
        order = __atomic_load_n(&pool.order, __ATOMIC_ACQUIRE);
        int threads = (int)(order & 255);
        if (me >= threads) continue;
        pool.work(pool.job, me, threads);
        meet(threads);
    }
    return NULL;
}

/* Threads 1 to count - 1 are there -> how many there are, with the caller. */
static int gather(int count) {
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.workers = 0;
        pool.sleepers = pool.arrived = 0;
        pthread_mutex_init(&pool.lock, NULL);
        pthread_cond_init(&pool.woken, NULL);
    }
    while (pool.workers + 1 < count) {
        int me = pool.workers + 1;
        pthread_t thread;
        pool.seen[me] = pool.order;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)me)) break;
        pthread_detach(thread);
        pool.workers = me;
    }
    return pool.workers + 1 < count ? pool.workers + 1 : count;
}

static void together(void (*work)(const void *, int, int), const void *job, int64_t count) {
    if (count <= 1) {
        work(job, 0, 1);
        return;
    }
    pthread_mutex_lock(&pool.turn);
    int threads = gather(count < MOST_THREADS ? (int)count : MOST_THREADS);
    pool.work = work;
    pool.job = job;
    set(&pool.order, (pool.order & ~255u) + 256 + (uint32_t)threads);
    work(job, 0, threads);
    meet(threads);
    pthread_mutex_unlock(&pool.turn);
}

